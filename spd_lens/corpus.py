"""`Corpus`: what the model wrote, as records in prompt order, and the JSONL file that survives being killed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from spd_lens.errors import SPDError
from spd_lens.storage import write_json

FinishReason = Literal["eos", "stop", "length"]
NOT_APPLIED = "generation_config_not_applied"
"""The one setting that no completion depends on: for readers, and not compared when a corpus is continued."""
Key = tuple[str, int]
"""Prompt id and sample number: names a completion within a corpus."""


@dataclass(frozen=True)
class Record:
    """One completion, with the token ids that were sampled (paper Eq. 13)."""

    id: str
    """The prompt's id."""
    prompt: str
    """The prompt as the task gave it, before chat template and special tokens."""
    completion: str
    """The text of `completion_ids` without special tokens."""
    prompt_ids: tuple[int, ...]
    """What the model was given, special tokens included."""
    completion_ids: tuple[int, ...]
    """What the model wrote, with the EOS token if and only if it ended with one."""
    finish_reason: FinishReason
    """`"eos"`: the model ended by itself; `"stop"`: with a stop string of its generation config, which is kept;
    `"length"`: it was cut at `max_new_tokens`."""
    sample: int = 0
    """0, 1, ... where several completions of one prompt were drawn."""

    @property
    def key(self) -> Key:
        return self.id, self.sample

    @property
    def n_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def n_completion_tokens(self) -> int:
        return len(self.completion_ids)

    def to_json(self) -> str:
        """One line, without the line break; the token counts are written for readers and not read back."""
        fields = {
            "id": self.id,
            "sample": self.sample,
            "prompt": self.prompt,
            "completion": self.completion,
            "finish_reason": self.finish_reason,
            "n_prompt_tokens": self.n_prompt_tokens,
            "n_completion_tokens": self.n_completion_tokens,
            "prompt_ids": self.prompt_ids,
            "completion_ids": self.completion_ids,
        }
        return json.dumps(fields, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Record:
        """Raises `ValueError`, `KeyError` or `TypeError` if the line is no record."""
        fields = json.loads(line)
        if fields["finish_reason"] not in get_args(FinishReason):
            raise ValueError(f"finish_reason is {fields['finish_reason']!r}")
        return cls(
            id=str(fields["id"]),
            prompt=str(fields["prompt"]),
            completion=str(fields["completion"]),
            prompt_ids=tuple(int(token) for token in fields["prompt_ids"]),
            completion_ids=tuple(int(token) for token in fields["completion_ids"]),
            finish_reason=fields["finish_reason"],
            sample=int(fields.get("sample", 0)),
        )


class Corpus(Sequence[Record]):
    """Completions in prompt order, and the settings they were made with."""

    def __init__(
        self,
        records: Iterable[Record],
        *,
        settings: Mapping[str, Any] | None = None,
        path: Path | None = None,
        expected: int | None = None,
    ) -> None:
        """`expected`: how many records a finished run would hold; None if nothing says."""
        self.records: list[Record] = list(records)
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

    @property
    def complete(self) -> bool:
        """False for the file of a run that was interrupted; `generate` with the same settings finishes it."""
        return len(self.records) >= self._expected

    @classmethod
    def load(cls, path: str | Path) -> Corpus:
        """Read a corpus file, in prompt order. A half-written last line is left out; nothing is changed on disk.

        Without its settings file (another program's JSONL in this form), the records keep the file's order.

        Raises:
            SPDError: the file does not exist, or a line is no record.
        """
        path = Path(path)
        if not path.is_file():
            raise SPDError(f"corpus {path} does not exist; generate one with spd_lens.generate(..., path=...)")
        header = Header.read(path) if settings_path(path).exists() else None
        records, _ = read_records(path)
        if header is None:
            return cls(records.values(), path=path)
        return cls(header.sort(records), settings=header.settings, path=path, expected=len(header.order))


def settings_path(path: Path) -> Path:
    """Where the settings of a corpus file are: `corpus.jsonl` has `corpus.settings.json` beside it."""
    return path.with_name(f"{path.stem}.settings.json")


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
            fields = json.loads(place.read_text(encoding="utf-8"))
            return cls(fields["settings"], [(str(id), int(sample)) for id, sample in fields["order"]])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SPDError(
                f"{place} does not hold the settings of a corpus ({error}); move the corpus away and generate it again"
            ) from error

    def write(self, path: Path) -> None:
        """Replace the header of the corpus file `path`, atomically."""
        write_json(settings_path(path), {"settings": self.settings, "order": list(self.order)})

    def sort(self, records: Mapping[Key, Record]) -> list[Record]:
        """Records in prompt order; those of prompts that are not in the order come last, as found."""
        listed = [records[key] for key in self.order if key in records]
        known = set(self.order)
        return listed + [record for key, record in records.items() if key not in known]


def read_records(path: Path) -> tuple[dict[Key, Record], int]:
    """All whole records of a corpus file, and how many bytes they take up.

    A record is whole once its line break was written, so what follows the last line break is what a killed process
    left behind.

    Raises:
        SPDError: a whole line is no record, or two lines are the same completion.
    """
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    records: dict[Key, Record] = {}
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            record = Record.from_json(line)
        except (ValueError, KeyError, TypeError) as error:
            raise SPDError(f"line {number} of {path} is no record of a corpus ({error}); remove that line") from error
        if record.key in records:
            raise SPDError(
                f"line {number} of {path} repeats the completion of prompt {record.id!r}; remove one of them"
            )
        records[record.key] = record
    return records, whole


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
        self._lock = FileLock(f"{self.path}.lock")
        with disk_errors_explained(f"the corpus {self.path} cannot be written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
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
        if not self.path.exists():
            self.header.write(self.path)  # first, so that there is never a corpus of unknown settings
            self.path.touch()
            return 0
        if not settings_path(self.path).exists():
            raise SPDError(f"{self.path} exists, but its {settings_path(self.path).name} does not; give another path")
        earlier = Header.read(self.path)
        then, now = (
            {name: value for name, value in settings.items() if name != NOT_APPLIED}
            for settings in (earlier.settings, self.header.settings)
        )
        refuse_other_settings(f"{self.path} was generated", then, now)
        self.done, size = read_records(self.path)
        foreign = next((key for key in self.done if key not in set(self.header.order)), None)
        if foreign is not None:
            raise SPDError(
                f"{self.path} holds a completion of prompt {foreign[0]!r}, which is not among the prompts now; "
                "give all of its prompts again or another path"
            )
        if list(earlier.order) != list(self.header.order):
            self.header.write(self.path)  # more prompts than before, or in another order
        os.truncate(self.path, size)  # a half-written last line would swallow the next record
        return size

    def append(self, records: Sequence[Record]) -> None:
        """Write records and make sure that they are on the disk.

        Raises:
            SPDError: they could not be written (disk full). The file then ends with the record before them.
        """
        data = b"".join(record.to_json().encode() + b"\n" for record in records)
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
        self._size += len(data)
        self.done |= {record.key: record for record in records}

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        """A file that never got a record, since something failed before, goes: it would refuse other settings later."""
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
    text = json.dumps(settings.get(name), ensure_ascii=False)
    return f"{name} = {text if len(text) <= 80 else text[:77] + '...'}"


@contextlib.contextmanager
def disk_errors_explained(what: str) -> Iterator[None]:
    """`OSError` as `SPDError`: `what` went wrong, why, and that another path may do."""
    try:
        yield
    except OSError as error:
        raise SPDError(f"{what}: {error.strerror or error}; give another path") from error
