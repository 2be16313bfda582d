"""`Store`: files by the hash of their content, and named records, in a directory or at any URL that fsspec reaches."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from spd_lens.errors import UNREADABLE, DamagedFile, SPDError, one_line
from spd_lens.files.publishing import Inventory, damage, file_sha256, make_directory, publish, replacing

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Store:
    """A place that many machines reach, in which a file is an object named after its sha256.

    | name | what |
    | --- | --- |
    | `sha256/ab/abcd…` | the content of a file |
    | any other name | a record in JSON, which says what the objects are |

    Where the place is a file system, an object or a record is whole or not there: it gets its name once it is written,
    in a directory once it is on the disk.
    """

    def __init__(self, url: str | Path) -> None:
        """Open a place; nothing is read or written.

        Args:
            url: A directory, or a URL such as `file:///shared/study`, `memory://study` or `s3://bucket/study`.

        Raises:
            SPDError: fsspec does not know the scheme, or the package for it is not installed.
        """
        try:
            self._files, self._root = url_to_fs(str(url))
        except Exception as error:  # every scheme's package raises its own
            raise SPDError(
                f"the store {url} cannot be opened ({one_line(error)}); install the package for its scheme, or give a "
                "directory or another URL that fsspec reaches"
            ) from error
        self.url = str(self._files.unstrip_protocol(self._root))
        """The whole address, by which another process opens the same place."""

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def check(self) -> None:
        """Raise `SPDError` unless a record can be written here, read back and removed: before hours of work for it."""
        name, content = f"check-{secrets.token_hex(4)}.json", {"written": "read"}
        self.write(name, content)
        if self.read(name) != content:
            raise SPDError(f"{self.url} does not give back what was written to it; choose another place")
        with self._explained("written"):
            self._files.rm_file(self._path(name))

    def put(self, folder: Path, names: Iterable[str], known: Inventory | None = None) -> dict[str, dict[str, Any]]:
        """Store files of a folder, and say which they are.

        Args:
            folder: Where the files are.
            names: Their paths below it.
            known: What was stored of this folder before: files that have not changed since are not sent again.

        Returns:
            The `size` in bytes and the `sha256` of each file, by its name.
        """
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            file = folder / name
            entry = {"size": file.stat().st_size, "sha256": file_sha256(file)}
            if (known or {}).get(name) != entry:
                self._send(_object(name, entry), partial(self._files.put_file, str(file)))
            found[name] = entry
        return found

    def get(self, recorded: Inventory, folder: Path) -> None:
        """Write files, as `put` recorded them, into a folder; those that are there and the same stay as they are.

        Raises:
            DamagedFile: an object is missing, or is not what its name says; the file's place stays as it was.
            SPDError: a name that leads out of the folder, or a place that cannot be read or written.
        """
        for name, entry in recorded.items():
            path, place = _below(folder, name), _object(name, entry)
            if damage(folder, {name: entry}) is None:
                continue
            with replacing(path) as scratch:
                try:
                    with self._explained("read", FileNotFoundError):
                        self._files.get_file(self._path(place), str(scratch))
                except FileNotFoundError as error:
                    raise DamagedFile(f"{self.url} has no object {place}, which should hold {name}") from error
                if scratch.stat().st_size != entry["size"] or file_sha256(scratch) != entry["sha256"]:
                    raise DamagedFile(f"object {place} in {self.url} is not the {name} that was stored there")

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Write a record, or another one in its place."""
        content = (json.dumps(record, indent=1) + "\n").encode()
        self._send(name, lambda scratch: self._files.pipe_file(scratch, content))

    def read(self, name: str) -> Any:
        """A record, or None if there is none; `DamagedFile` if it is no JSON."""
        try:
            with self._explained("read", FileNotFoundError):
                content = self._files.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        try:
            return json.loads(content)
        except UNREADABLE as error:
            raise DamagedFile(f"{name} in {self.url} cannot be read as JSON: {error}") from error

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _send(self, name: str, send: Callable[[str], object]) -> None:
        final = self._path(name)
        scratch = f"{final}.{secrets.token_hex(4)}.tmp"
        with self._explained("written"):
            try:
                if isinstance(self._files, LocalFileSystem):
                    make_directory(Path(final).parent)
                    send(scratch)
                    publish(Path(scratch), Path(final))
                else:
                    self._files.makedirs(final.rpartition("/")[0], exist_ok=True)
                    send(scratch)
                    self._files.mv(scratch, final)
            except BaseException:
                with contextlib.suppress(Exception):  # what stopped it is what to say
                    self._files.rm_file(scratch)
                raise

    @contextlib.contextmanager
    def _explained(self, verb: str, *passed: type[Exception]) -> Iterator[None]:
        try:
            yield
        except passed:
            raise
        except Exception as error:  # every scheme's package raises its own
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise SPDError(
                f"{self.url} cannot be {verb} ({reason}); check the address, your rights and the connection"
            ) from error


def _object(name: str, entry: Mapping[str, Any]) -> str:
    """The name of a file's object; `DamagedFile` for an entry that could not have been recorded."""
    digest = entry.get("sha256")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest) or type(entry.get("size")) is not int:
        raise DamagedFile(f"what is recorded of {name} is not a size with a sha256")
    return f"sha256/{digest[:2]}/{digest}"


def _below(folder: Path, name: str) -> Path:
    """A file's place in the folder; `SPDError` for a name that leads out of it: records may be a stranger's."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise SPDError(f"a record names the file {name!r}, which would lie outside of {folder}; do not use this store")
    return folder / path
