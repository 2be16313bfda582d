"""`Corpus`: what the model wrote, as records in prompt order, and the JSONL file that survives being killed."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from spd_lens.errors import UNREADABLE, DamagedFile, SPDError, shortened
from spd_lens.files import (
    forget,
    is_blank,
    make_directory,
    note_undigested,
    read_json,
    refuse_stand_in,
    sync,
    write_json,
)  # fmt: skip
from spd_lens.generation.record import Key, Record, RunningSum, prompt_id, typed

_T = TypeVar("_T")
STREAMED_FROM = 2**26
"""Bytes of a corpus file that are held in memory. Its records take five times as much there, and training's rows twice
as much (docs/parallel-training.md), so that a larger file would crowd the model out."""
NOT_APPLIED = "generation_config_not_applied"
"""The one setting that no completion depends on; it is not compared when a corpus is continued."""


class Corpus(Sequence[Record]):
    """Completions in prompt order, and the settings they were made with.

    Those of a file of more than `STREAMED_FROM` bytes are read from it as they are asked for, and not held.
    """

    def __init__(
        self,
        records: Iterable[Record],
        *,
        settings: Mapping[str, Any] | None = None,
        path: Path | None = None,
        expected: int | None = None,
    ) -> None:
        """`expected`: how many records a finished run would hold; None if nothing says."""
        self.records: Sequence[Record] = records if isinstance(records, Streamed) else list(records)
        self.settings: dict[str, Any] = dict(settings or {})
        self.path = path
        self._expected = len(self.records) if expected is None else expected

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        return self.records[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __repr__(self) -> str:
        ended = sum(record.finish_reason != "length" for record in self.records)
        where = f", path={str(self.path)!r}" if self.path else ""
        return f"Corpus({len(self)} completions, {ended} ended by themselves{where})"

    @staticmethod
    def is_finished(path: Path) -> bool:
        """Whether a corpus file is there with a record for every prompt."""
        return path.exists() and not is_blank(path) and Corpus.load(path).complete

    @property
    def complete(self) -> bool:
        """False for the file of a run that was interrupted; `generate` with the same settings finishes it."""
        return len(self.records) >= self._expected

    @classmethod
    def load(cls, path: str | Path) -> Corpus:
        """Read a corpus file, in prompt order. A half-written last line is left out; nothing is changed on disk.

        A file without settings beside it, another program's JSONL in this form, is read whole and in its own order,
        with or without a last line break.

        Raises:
            SPDError: the file does not exist, or a line is no record.
        """
        path = Path(path)
        if not path.is_file():
            raise SPDError(f"corpus {path} does not exist; generate one with spd_lens.generate(..., path=...)")
        header = Header.read(path) if settings_path(path).exists() else None
        records: Iterable[Record]
        sums = RunningSum()
        if path.stat().st_size > STREAMED_FROM:
            found = scanned(path, sums, ours=header is not None)
            lines = {record.key: line for line, record in found if record is not None}
            records = Streamed(path, lines.values() if header is None else header.sort(lines))
        else:
            held, _ = read_records(path, sums, ours=header is not None)
            records = held.values() if header is None else header.sort(held)
        if header is not None and len(records) and not sums.begun:
            note_undigested(path)
        if header is None:
            return cls(records, path=path)
        return cls(records, settings=header.settings, path=path, expected=len(header.order))


def corpus_digest(corpus: Iterable[Record]) -> str:
    """Names a corpus by what training sees: ids and tokens of its completions, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for record in corpus:
        digest.update(json.dumps([record.id, record.sample, record.prompt_ids, record.completion_ids]).encode())
    return digest.hexdigest()


def settings_path(path: Path) -> Path:
    """Where the settings of a corpus file are: `corpus.jsonl` has `corpus.settings.json` beside it."""
    return path.with_name(f"{path.stem}.settings.json")


def recorded_settings(path: str | Path | None) -> dict[str, Any] | None:
    """The settings of a corpus file that is there to be continued; None where there is none."""
    there = path is not None and Path(path).exists() and settings_path(Path(path)).exists()
    return dict(Header.read(Path(path)).settings) if there and path is not None else None


@dataclass(frozen=True)
class Header:
    """What stands beside the JSONL: settings that decide its content, and the prompts' order."""

    settings: Mapping[str, Any]
    order: Sequence[Key]

    @classmethod
    def read(cls, path: Path) -> Header:
        """The header of the corpus file `path`."""
        place = settings_path(path)
        try:
            fields = read_json(place)
            order = [(prompt_id(id), typed({"sample": n}, "sample", int)) for id, n in typed(fields, "order", list)]
            return cls(typed(fields, "settings", dict), order)
        except (*UNREADABLE, DamagedFile) as error:
            raise SPDError(
                f"{place} does not hold the settings of a corpus ({error}); move the corpus away and generate it again"
            ) from error

    def write(self, path: Path) -> None:
        """Replace the header of the corpus file `path`, atomically."""
        write_json(settings_path(path), {"settings": self.settings, "order": list(self.order)})

    def sort(self, records: Mapping[Key, _T]) -> list[_T]:
        """What there is of each record, in prompt order; of prompts that are not in it it comes last, as found."""
        listed = [records[key] for key in self.order if key in records]
        known = set(self.order)
        return listed + [record for key, record in records.items() if key not in known]


def read_records(path: Path, sums: RunningSum, *, ours: bool = True) -> tuple[dict[Key, Record], int]:
    """All whole records of a corpus file, and how many bytes they take up. Their lines are counted in `sums`.

    A record of `CorpusWriter` (`ours`) is whole once its line break was written, so what follows the last line break is
    what a killed process left behind; JSON has no zero bytes, so what begins with a line of such is what a power
    failure left. Other programs may end a file without a line break.

    Raises:
        SPDError: a whole line is no record or not what was written, or two lines are the same completion.
    """
    records: dict[Key, Record] = {}
    whole = 0
    for (start, size, _), record in scanned(path, sums, ours=ours):
        whole = start + size
        if record is not None:
            records[record.key] = record
    return records, whole


Line = tuple[int, int, int]
"""Where a line starts in its file and its size, in bytes, and its CRC-32."""


def scanned(path: Path, sums: RunningSum, *, ours: bool) -> Iterator[tuple[Line, Record | None]]:
    """The whole lines of a corpus file, and the record of each; None if it is blank.

    Raises as `read_records`.
    """
    refuse_stand_in(path)
    seen: set[Key] = set()
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if ours and (not line.endswith(b"\n") or b"\0" in line):
                return
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            record = None
            if text.strip():
                try:
                    sums.check(text.rstrip(b"\r\n"))
                except ValueError as error:
                    raise SPDError(
                        f"line {number} of {path} is not what was written there ({error}); restore it, or cut the file "
                        "off before it, so that the rest is generated again, or take the key sum out of every line if "
                        "the change is yours"
                    ) from error
                try:
                    record = Record.from_json(text.decode("utf-8"))
                except UNREADABLE as error:
                    raise SPDError(
                        f"line {number} of {path} is no record of a corpus ({error}); remove that line"
                    ) from error
                if record.key in seen:
                    raise SPDError(
                        f"line {number} of {path} repeats the completion of prompt {record.id!r}; remove one of them"
                    )
                seen.add(record.key)
            yield (start, len(line), zlib.crc32(line)), record
            start += len(line)


class Streamed(Sequence[Record]):
    """Records that stay in their file: 24 bytes of memory for each, and a line is read whenever it is asked for."""

    def __init__(self, path: Path, lines: Iterable[Line]) -> None:
        """`lines`: those of the records, in their order."""
        self._path = path
        self._lines = np.array(list(lines), dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, size, crc = map(int, self._lines[index])
        try:
            with self._path.open("rb", buffering=0) as file:
                line = os.pread(file.fileno(), size, start)
            if zlib.crc32(line) != crc:
                raise ValueError("a line is another")
            return Record.from_json(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
        except (OSError, *UNREADABLE) as error:
            raise SPDError(f"{self._path} has changed since it was opened ({error}); load it again") from error


class CorpusWriter:
    """Appends records to a corpus file so that a record is either wholly there or not at all."""

    def __init__(self, path: str | Path, settings: Mapping[str, Any], order: Sequence[Key]) -> None:
        """Open or create the file; what it holds already is in `done`.

        Raises:
            SPDError: it was made with other settings or other prompts, or another process is writing it.
        """
        self.path = Path(path)
        self.header = Header(dict(settings), list(order))
        self.done: dict[Key, Record] = {}
        self._sums = RunningSum()
        self._lock = FileLock(f"{self.path}.lock")
        with disk_errors_explained(f"the corpus {self.path} cannot be written"):
            make_directory(self.path.parent)
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise SPDError(f"another process is writing {self.path}; wait for it or give another path") from error
        try:
            with disk_errors_explained(f"the corpus {self.path} cannot be written"):
                self._size = self._take_up()
                self._file = self.path.open("r+b", buffering=0)
        except SPDError:
            self._lock.release()
            raise

    def _take_up(self) -> int:
        if self.path.is_symlink():  # a stranger's folder could name any file, which would be cut and written to
            raise SPDError(f"{self.path} is a link; give the path of the corpus itself")
        if not self.path.exists() or is_blank(self.path):
            self.header.write(self.path)  # first, so that there is never a corpus of unknown settings
            self.path.write_bytes(b"")
            sync(self.path)
            return 0
        if not settings_path(self.path).exists():
            raise SPDError(f"{self.path} exists, but its {settings_path(self.path).name} does not; give another path")
        earlier = Header.read(self.path)
        then, now = (
            {name: value for name, value in settings.items() if name != NOT_APPLIED}
            for settings in (earlier.settings, self.header.settings)
        )
        refuse_other_settings(f"{self.path} was generated", then, now)
        self.done, size = read_records(self.path, self._sums)
        asked = set(self.header.order)
        foreign = next((key for key in self.done if key not in asked), None)
        if foreign is not None:
            raise SPDError(
                f"{self.path} holds a completion of prompt {foreign[0]!r}, which is not among the prompts now; "
                "give all of its prompts again or another path"
            )
        if list(earlier.order) != list(self.header.order):
            self.header.write(self.path)  # more prompts than before, or in another order
        if size != self.path.stat().st_size:
            forget(self.path)
        os.truncate(self.path, size)  # a half-written last line would swallow the next record
        return size

    def append(self, records: Sequence[Record]) -> None:
        """Write records and make sure that they are on the disk.

        Raises:
            SPDError: they could not be written (disk full). The file then ends with the record before them.
        """
        sums = self._sums.copy()
        data = b"".join(sums.add(record.to_json()) + b"\n" for record in records)
        forget(self.path)
        try:
            self._file.seek(self._size)
            rest = memoryview(data)
            while rest:  # an unbuffered write may take only a part
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, self._size)
            raise SPDError(
                f"writing {self.path} failed ({error.strerror}); its {len(self.done)} completions of "
                f"{len(self.header.order)} are kept: make room and run the same again to continue"
            ) from error
        self._sums = sums
        self._size += len(data)
        self.done |= {record.key: record for record in records}

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the file. One without any record, since something failed before, is removed: it would refuse other
        settings later."""
        self._file.close()
        if exception[0] is not None and not self._size:
            with contextlib.suppress(OSError):
                self.path.unlink()
                settings_path(self.path).unlink()
        self._lock.release()


def refuse_other_settings(what: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `SPDError` naming the first setting that differs; `what` is, e.g., "corpus.jsonl was generated"."""
    for name in [*earlier, *(name for name in now if name not in earlier)]:
        if earlier.get(name) != now.get(name):
            raise SPDError(
                f"{what} with {_shown(name, earlier)}, not {_shown(name, now)}; "
                "continue with the same settings or give another path"
            )


def _shown(name: str, settings: Mapping[str, Any]) -> str:
    return f"{name} = {shortened(json.dumps(settings.get(name), ensure_ascii=False), 80)}"


@contextlib.contextmanager
def disk_errors_explained(what: str) -> Iterator[None]:
    """Raise an `OSError` inside as an `SPDError` that says `what` went wrong and why."""
    try:
        yield
    except OSError as error:
        raise SPDError(f"{what}: {error.strerror or error}; give another path") from error
