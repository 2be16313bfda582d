"""Reading the original files, or the hub's copy of them, as rows that know where they came from.

Data files are not trusted: they are read as JSON or CSV only, and whatever is wrong with one is an `SPDError` that
names the file and the line or record.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spd_lens.errors import SPDError, one_line, shortened
from spd_lens.files import refuse_stand_in

_LONGEST = 2**24
"""Characters of a text; the longest context of any model is shorter."""
_LARGEST = 2**31
"""Bytes of a file, which is read into memory."""


@dataclass(frozen=True)
class Row:
    """One record of a source."""

    data: dict[str, Any]
    where: str
    """File and line (or record), for error messages: `train.jsonl, line 17`."""

    def text(self, name: str, *, empty: bool = False) -> str:
        """The field `name`, which must be a string, and not a blank one unless `empty`."""
        value = self._field(name)
        if not isinstance(value, str) or not (empty or value.strip()):
            raise SPDError(f"{self.where}: the field {name!r} must be a text that is not empty, and is {_short(value)}")
        if len(value) > _LONGEST:
            raise SPDError(f"{self.where}: the field {name!r} has {len(value)} characters, and may have {_LONGEST}")
        return value

    def texts(self, name: str) -> list[str]:
        """The field `name`, which must be a list of strings."""
        value = self._field(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise SPDError(f"{self.where}: the field {name!r} must be a list of texts, and is {_short(value)}")
        return value

    def number(self, name: str) -> float:
        """The field `name` as a finite number; a string that spells one is fine (the hub stores some as text)."""
        value = self._field(name)
        try:
            number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise SPDError(f"{self.where}: the field {name!r} must be a finite number, and is {_short(value)}")
        return number

    def integer(self, name: str) -> int:
        """The field `name`, which must be a whole number."""
        number = self.number(name)
        if number != int(number):
            raise SPDError(f"{self.where}: the field {name!r} must be a whole number, and is {number}")
        return int(number)

    def _field(self, name: str) -> Any:
        if name not in self.data:
            raise SPDError(f"{self.where}: the field {name!r} is missing; there are {', '.join(map(str, self.data))}")
        return self.data[name]


@dataclass
class Source:
    """Where a task's records come from: a local directory if there is one, the hub otherwise."""

    task: str
    path: Path | None
    hub: str
    revision: str | None
    local_form: str
    """The files that work in place of the hub, in words, for the message when the hub cannot be reached."""
    digests: dict[str, str] = field(default_factory=dict)
    """sha256 of what was read: by file name, or by hub name and revision."""

    def __post_init__(self) -> None:
        if self.path is None:
            return
        path = Path(self.path).expanduser()
        if (path / self.task).is_dir():  # one data directory for several tasks
            path = path / self.task
        if not path.is_dir():
            raise SPDError(f"{self.path} is not a directory; {self.task} needs one with {self.local_form}")
        self.path = path

    def file(self, name: str, *, columns: Sequence[str] = (), key: str | None = None) -> list[Row]:
        """Rows of one local file. `columns` names those of a CSV file without a header; `key` is where a JSON
        object keeps its list of records."""
        assert self.path is not None
        if not (self.path / name).is_file():
            raise SPDError(f"{self.path / name} is missing; {self.task} needs {self.local_form} in that directory")
        rows, self.digests[name] = read_rows(self.path / name, columns=columns, key=key)
        return rows

    def dataset(self, config: str | None, split: str) -> list[Row]:
        """Rows of one split on the hub."""
        place = f"{self.hub}{f'/{config}' if config else ''}/{split}@{self.revision or 'main'}"
        try:
            import datasets  # slow to import, and not needed for local files

            data = datasets.load_dataset(self.hub, config, split=split, revision=self.revision)
            records = [dict(record) for record in data]
        except Exception as error:  # what comes out of there is open-ended: network, cache, Arrow, a missing split
            raise SPDError(
                f"cannot read {self.hub} ({split}) from the hub: {one_line(error)}; "
                f"without the hub, give path= (--data-dir), a directory with {self.local_form}"
            ) from error
        text = json.dumps(records, sort_keys=True, ensure_ascii=True, default=str)
        self.digests[place] = hashlib.sha256(text.encode()).hexdigest()
        return [Row(record, f"{place}, row {index}") for index, record in enumerate(records)]


def read_rows(path: Path, *, columns: Sequence[str] = (), key: str | None = None) -> tuple[list[Row], str]:
    """Rows of a `.jsonl`, `.json` or `.csv` file, and the file's sha256."""
    refuse_stand_in(path)
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise SPDError(f"{path} has {size} bytes, and may have {_LARGEST}; divide it, or leave records out")
        content = path.read_bytes()
    except OSError as error:
        raise SPDError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SPDError(f"{path}, line {line}: not UTF-8 text; the file is damaged or of another kind") from error
    if not text.strip():
        raise SPDError(f"{path} is empty; download it again")
    if path.suffix == ".csv":
        records = _of_csv(path, text, columns)
    else:
        records = _of_jsonl(path, text) if path.suffix == ".jsonl" else _of_json(path, text, key)
    rows = []
    for where, record in records:
        if not isinstance(record, dict):
            raise SPDError(f"{where}: not a JSON object but {_short(record)}")
        rows.append(Row(record, where))
    return rows, hashlib.sha256(content).hexdigest()


def _of_jsonl(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # split on "\n" only: str.splitlines would also cut at U+2028, which may stand inside a JSON string
    lines = text.split("\n")
    last = max(number for number, line in enumerate(lines, 1) if line.strip())
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        cut = "; it is the last line: the file may be cut off" if number == last else ""
        yield where, _parse(line, where, cut)


def _of_json(path: Path, text: str, key: str | None) -> Iterator[tuple[str, Any]]:
    content = _parse(text, str(path), "; the file may be cut off")
    if key is not None:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, list):
        raise SPDError(f"{path}: holds no list of records{f' under {key!r}' if key else ''}")
    for number, record in enumerate(content, 1):
        yield f"{path}, record {number}", record


def _of_csv(path: Path, text: str, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    # newline="" leaves line breaks inside quoted fields to the parser; strict makes an unclosed quote an error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for values in reader:
            where = f"{path}, line {reader.line_num}"
            if len(values) != len(columns):
                raise SPDError(
                    f"{where}: {len(values)} columns where {len(columns)} are needed ({', '.join(columns)}); "
                    "the file may be cut off"
                )
            yield where, dict(zip(columns, values, strict=True))
    except csv.Error as error:
        raise SPDError(f"{path}, line {reader.line_num}: not CSV ({error}); the file may be cut off") from error


def _parse(text: str, where: str, hint: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = where if ", line " in where else f"{where}, line {error.lineno}"
        raise SPDError(f"{place}: not JSON ({error.msg} at column {error.colno}){hint}") from error
    except (RecursionError, ValueError) as error:  # nested thousands deep; an integer of thousands of digits
        raise SPDError(f"{where}: not readable as JSON ({one_line(error)})") from error


def _short(value: Any) -> str:
    return shortened(repr(value))
