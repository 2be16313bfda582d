"""`manifest.json`: what a run or a study wrote, file by file, so that what was changed since is told from it.

A file is recorded once it is finished, and its entry goes before it is replaced or written to. So whatever kills a
process, an entry is that of the file beside it, or there is none.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from filelock import FileLock
from pydantic import Field, ValidationError, field_validator

from spd_lens.errors import UNREADABLE, DamagedFile, SPDError
from spd_lens.files.digests import DIGEST, canonical, signed, unsigned
from spd_lens.files.limits import json_within
from spd_lens.files.publishing import clear_leftovers, file_sha256, replacing
from spd_lens.files.schemas import Schema

MANIFEST = "manifest.json"
_LOCK = ".manifest.lock"
_KIND: Final = "manifest of spd_lens"
_ABOVE = 6
"""How many folders above a file its manifest may be: `SOURCE/METHOD/SEED/eval/TASK.json` is in that of a study."""


class Entry(Schema):
    """A file as it was written."""

    size: int = Field(ge=0)
    """In bytes."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    stage: str
    """What wrote it: `extract`, `generate`, ..."""


class Manifest(Schema):
    """All files of a folder that were finished, by their paths below it."""

    kind: Literal["manifest of spd_lens"] = _KIND
    files: dict[str, Entry] = Field(default_factory=dict)

    @field_validator("files")
    @classmethod
    def _below_the_folder(cls, files: dict[str, Entry]) -> dict[str, Entry]:
        for name in files:
            if (path := PurePosixPath(name)).is_absolute() or ".." in path.parts:
                raise ValueError(f"{name!r} is not below the folder")
        return files

    @classmethod
    def of(cls, folder: Path) -> Manifest | None:
        """The manifest of a folder; None if it has none (a file of that name which is another program's is none).

        Raises:
            SPDError: it is damaged. Not `DamagedFile`: that would say that what it lists is damaged, too.
        """
        path = folder / MANIFEST
        try:
            return _read(path, _state(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, DamagedFile, ValidationError, *UNREADABLE) as error:
            reason = error if isinstance(error, DamagedFile) else "it is no manifest"
            raise SPDError(
                f"{path} is damaged ({reason}), so that nothing can be compared with it; restore it, or delete it and "
                "go on without"
            ) from error

    def damage(self, folder: Path, name: str) -> str | None:
        """What is wrong with a file that is listed; None if nothing is."""
        entry, path = self.files[name], folder / name
        try:
            state = _state(path)
            if state[1] == entry.size and _sha256(path, state) == entry.sha256:
                return None
        except FileNotFoundError:
            return f"{path} is missing, which the stage {entry.stage!r} wrote"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        return f"{path} is not what the stage {entry.stage!r} wrote, by {folder / MANIFEST}"


def check_recorded(path: str | Path) -> None:
    """Raise `DamagedFile` for a file that is not as the manifest above it has it. Each state of it is hashed once."""
    for folder, manifest, name in _listing(Path(path)):
        if name in manifest.files and (problem := manifest.damage(folder, name)):
            raise DamagedFile(f"{problem}; restore it, or delete {MANIFEST} if the change is yours")


def hash_again() -> None:
    """Trust nothing that was hashed before in this process."""
    _sha256.cache_clear()
    _read.cache_clear()


def forget(path: str | Path) -> None:
    """Take a file, or all that is below a directory, out of the manifest, before it is written anew or added to."""
    for folder, manifest, name in _listing(Path(path)):
        if any(_is_below(listed, name) for listed in manifest.files):
            with _locked(folder):
                now = Manifest.of(folder) or Manifest()
                _write(folder, {listed: entry for listed, entry in now.files.items() if not _is_below(listed, name)})


def record_files(folder: Path, files: Iterable[Path], stage_of: Callable[[PurePosixPath], str | None]) -> None:
    """List files that are not listed yet. Those that are stay as they were written, whatever is there now.

    Args:
        folder: Where the manifest is or will be.
        files: Finished files below it.
        stage_of: The stage that wrote a file, by its path below the folder; None for a file of somebody else.
    """
    clear_leftovers(folder / MANIFEST)
    known = (Manifest.of(folder) or Manifest()).files
    made: dict[str, Entry] = {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        if name not in known and (stage := stage_of(PurePosixPath(name))) is not None:
            state = _state(path)
            made[name] = Entry(size=state[1], sha256=_sha256(path, state), stage=stage)
    if not made:
        return
    with _locked(folder):
        _write(folder, {**made, **(Manifest.of(folder) or Manifest()).files})


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from the manifest."""
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire()
    except OSError as error:  # a link that stands there, for instance
        raise SPDError(f"{folder / _LOCK} cannot be locked ({error.strerror}); delete it") from error
    try:
        yield
    finally:
        lock.release()


def _write(folder: Path, files: dict[str, Entry]) -> None:
    manifest = Manifest(files=dict(sorted(files.items())))
    with replacing(folder / MANIFEST) as scratch:
        scratch.write_text(signed(manifest.model_dump()), encoding="utf-8")


def _listing(path: Path) -> Iterator[tuple[Path, Manifest, str]]:
    """The folder of the nearest manifest above a file, the manifest, and the file's name in it; nothing if none is."""
    path = path.absolute()
    for folder in list(path.parents)[:_ABOVE]:
        if (manifest := Manifest.of(folder)) is not None:
            yield folder, manifest, path.relative_to(folder).as_posix()
            return


def _is_below(listed: str, name: str) -> bool:
    return listed == name or listed.startswith(f"{name}/")


_State = tuple[int, int, int, int]


def _state(path: Path) -> _State:
    """Inode, size and times, by which a file is hashed again if anybody touched it."""
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@lru_cache(maxsize=64)
def _read(path: Path, state: _State) -> Manifest | None:
    content = json_within(path)
    if type(content) is not dict or (content.get("kind") != _KIND and DIGEST not in content):
        return None
    return Manifest.model_validate_json(canonical(unsigned(content)))


@lru_cache(maxsize=65536)
def _sha256(path: Path, state: _State) -> str:
    return file_sha256(path)
