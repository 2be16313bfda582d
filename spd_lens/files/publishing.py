"""Files and directories that are whole or not there, whatever kills the process or the machine meanwhile.

What is written gets a name of its own first, beside its place, and is given its real name in one step once it is on the
disk. What a killed process leaves behind is therefore known by its name, and is cleared away by whoever writes the same
file again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from spd_lens.errors import UNREADABLE, SPDError

_SCRATCH = (
    re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)-[0-9a-f]{8}\.tmp", re.DOTALL),
    # the names in earlier versions; those of tensors did not say which process
    re.compile(r"\.(?P<name>.+\.(jsonl?|yaml|md|csv|html))\.(?P<pid>\d+)", re.DOTALL),
    re.compile(r"\.(?P<name>.+\.safetensors)\.(?P<pid>)[a-z0-9_]{8}", re.DOTALL),
)
"""Names of temporary files: whose place they are to take, and the process that writes them."""
_REMEDY = "free some space or choose another place"
_IGNORED = (".lock", ".DS_Store", "Thumbs.db", "desktop.ini")
"""Files that do not occupy a directory: our lock, and what file managers put into directories."""

Inventory = Mapping[str, Mapping[str, Any]]
"""The `size` in bytes and the `sha256` of each file, by its name."""


def publish(scratch: Path, final: Path) -> None:
    """Give a finished file or directory its name. After a power failure there is the old one or the whole new one."""
    if scratch.is_dir():
        mode = scratch.stat().st_mode & 0o666
        for file in _files(scratch):
            file.chmod(mode)  # some libraries make files that only their owner reads
    _sync_all(scratch)
    os.replace(scratch, final)
    _sync(final.parent)


def sync(path: Path) -> None:
    """Put a file, or a directory with all that is in it, on the disk, and its name too."""
    _sync_all(path)
    _sync(path.parent)


def _sync_all(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            if not inner.is_symlink():
                _sync_all(inner)
    _sync(path)


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # not every file system knows how to sync a directory
        if error.errno not in (errno.EINVAL, errno.EACCES, errno.ENOTSUP) or not path.is_dir():
            raise


def make_directory(path: Path) -> None:
    """Make a directory with its parents, so that they survive a power failure."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in missing:
        _sync(place.parent)


def refuse_linked(path: Path) -> None:
    """Raise `SPDError` where a directory below `path` is a link: what is written there would land somewhere else."""
    for folder, inner, _ in os.walk(path):
        for name in inner:
            if (place := Path(folder, name)).is_symlink():
                raise SPDError(f"{place} is a link, and files would be written where it leads; put a directory there")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new empty file to write to. It becomes `path` at the end, or goes if anything goes wrong.

    Raises `SPDError` where the disk is full or the directory cannot be written.
    """
    path = Path(path)
    with _explained(path):
        make_directory(path.parent)
        clear_leftovers(path)
        scratch = _scratch(path)
        # a new file of our own, and never the target of a link that another user has put there
        os.close(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0), 0o666))
    try:
        with _explained(path):
            yield scratch
            publish(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def filling(directory: str | Path, remedy: str = _REMEDY) -> Iterator[Path]:
    """A new directory to write into. It becomes `directory`, which must be free, at the end, or goes.

    Raises `SPDError` where the disk is full or the place cannot be written.
    """
    directory = Path(directory)
    with scratch_directory(directory, remedy) as scratch, _explained(directory, remedy):
        yield scratch
        if directory.is_dir() and is_free(directory):
            shutil.rmtree(directory)  # a lock or the like at most
        publish(scratch, directory)


@contextlib.contextmanager
def scratch_directory(path: Path, remedy: str = _REMEDY) -> Iterator[Path]:
    """A new directory beside `path`, which goes at the end; if the process is killed, when another one is made there.

    Raises `SPDError` where it cannot be made.
    """
    with _explained(path, remedy):
        make_directory(path.parent)
        clear_leftovers(path)
        scratch = _scratch(path)
        scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


@contextlib.contextmanager
def _explained(path: Path, remedy: str = _REMEDY) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SPDError(f"{path} cannot be written ({error}); {remedy}") from error


def clear_leftovers(path: Path) -> None:
    """Remove what processes that no longer run have left of their attempts to write `path`."""
    for place in path.parent.iterdir():
        found = _as_scratch(place)
        if found and found["name"] == path.name and not _runs(found["pid"]):
            with contextlib.suppress(OSError):
                if place.is_dir() and not place.is_symlink():
                    shutil.rmtree(place)
                else:
                    place.unlink()


def _as_scratch(place: Path) -> re.Match[str] | None:
    return next((found for pattern in _SCRATCH if (found := pattern.fullmatch(place.name))), None)


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True  # it belongs to another user
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    return True


def is_free(directory: str | Path, *first: str) -> bool:
    """Whether something new may begin here: there is nothing, or nothing but what a killed beginning leaves.

    Args:
        directory: The place, which may be missing.
        first: Names of the files that are written first: empty ones, which a power failure leaves, are nothing yet.
    """
    return not occupants(directory, *first)


def occupants(directory: str | Path, *first: str) -> list[Path]:
    """What keeps a place from being free: files that were put there, or the place itself if it is no directory."""
    directory = Path(directory)
    if not directory.is_dir():
        return [directory] if directory.exists() or directory.is_symlink() else []
    return [
        place
        for place in directory.iterdir()
        if not (place.name in _IGNORED or _as_scratch(place) or (place.name in first and is_blank(place)))
    ]


def is_blank(path: Path) -> bool:
    """Whether a file is there and holds nothing: no byte, or zeros alone, as some file systems fill lost blocks."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return not any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(1 << 20), b""))


def check_writable(path: str | Path, *, directory: bool = False) -> None:
    """Raise `SPDError` if a file, or files in a directory, cannot be written at `path`: before hours of work for it."""
    path = Path(path)
    if path.exists() and path.is_dir() != directory:
        raise SPDError(f"{path} is {'a directory' if path.is_dir() else 'a file'}; choose another --out")
    place = path if directory else path.parent
    while not place.exists():
        place = place.parent
    probe = _scratch(place / path.name)
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise SPDError(f"{path} cannot be written ({error.strerror}); choose another --out") from error


def inventory(directory: Path) -> dict[str, dict[str, Any]]:
    """Every file in a directory with its size and sha256, by its name."""
    return {
        str(file.relative_to(directory)): {"size": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(_files(directory))
    }


def damage(directory: Path, recorded: Inventory, *, hashed_up_to: float = float("inf")) -> str | None:
    """What is wrong with the first file that is not as `inventory` recorded it; None if all are.

    Args:
        directory: Where the files are.
        recorded: What `inventory` returned earlier.
        hashed_up_to: Files of more bytes are compared by their size alone.
    """
    for name, entry in recorded.items():
        file = directory / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{file} has {file.stat().st_size} bytes and had {entry['size']}"
        if entry["size"] <= hashed_up_to and file_sha256(file) != entry["sha256"]:
            return f"{file} is not what was written"
    return None


def unreadable_weights(directory: Path) -> str | None:
    """What is wrong with the weights of a directory without an `inventory`, as far as sizes and headers show."""
    files = {*directory.glob("*.safetensors")}
    try:
        for index in directory.glob("*.safetensors.index.json"):
            files |= {directory / name for name in json.loads(index.read_bytes())["weight_map"].values()}
        for file in sorted(files):
            with safe_open(str(file), framework="pt"):
                pass
    except (SafetensorError, OSError, *UNREADABLE) as error:
        return f"the weights in {directory} are damaged ({error})"
    return None if files else f"{directory} holds no weights"


def file_sha256(file: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(directory: Path) -> Iterator[Path]:
    return (place for place in directory.rglob("*") if place.is_file() and not place.is_symlink())
