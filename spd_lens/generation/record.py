"""`Record`: one completion of a corpus, and its line of JSON."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from spd_lens.errors import shortened

FinishReason = Literal["eos", "stop", "length"]
_T = TypeVar("_T")
Key = tuple[str, int]
"""Prompt id and sample number: names a completion within a corpus."""

_WRITTEN = (
    "id", "sample", "prompt", "completion", "finish_reason", "n_prompt_tokens", "n_completion_tokens", "prompt_ids",
    "completion_ids",
)  # fmt: skip
"""The fields of a line of a corpus file, in their order."""


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
        """The record as one line without its line break. Token counts are written for readers and not read back."""
        fields = {name: getattr(self, name) for name in _WRITTEN}
        return json.dumps(fields, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str | bytes) -> Record:
        """Read a line; raises one of `errors.UNREADABLE` if it is no record."""
        fields = json.loads(line)
        if fields["finish_reason"] not in get_args(FinishReason):
            raise ValueError(f"finish_reason is {fields['finish_reason']!r}")
        return cls(
            id=prompt_id(fields["id"]),
            prompt=typed(fields, "prompt", str),
            completion=typed(fields, "completion", str),
            prompt_ids=_tokens(fields, "prompt_ids"),
            completion_ids=_tokens(fields, "completion_ids"),
            finish_reason=fields["finish_reason"],
            sample=typed({"sample": 0, **fields}, "sample", int),
        )


class RunningSum:
    """The checksum that a line of a corpus file ends with, under the key `sum`: of the line before, and of itself.

    So an edited line is told from those around it, and none is missing or elsewhere. What earlier versions wrote has
    none; what is appended to it has.
    """

    def __init__(self) -> None:
        self._last = b""
        self.begun = False
        """Whether a line had one; all behind it must."""

    def add(self, line: str) -> bytes:
        """A line of JSON with its checksum, which is counted as the last line."""
        content = line.encode("utf-8", "backslashreplace")
        self._last, self.begun = self._after(content), True
        return content[:-1] + b', "sum": "' + self._last + b'"}'

    def check(self, line: bytes) -> None:
        """Count a line that was read, without its line break; `ValueError` if it is not the one that was written."""
        found = _SUM.search(line)
        if found is None and (self.begun or b'"sum":' in line):  # in a text the quotes would be escaped
            raise ValueError("its sum is missing or does not end it")
        wanted = self._after(line if found is None else line[: found.start()] + b"}")
        if found is not None and found[1] != wanted:
            raise ValueError("its sum is not that of this line behind the one before")
        self._last, self.begun = wanted, found is not None

    def copy(self) -> RunningSum:
        """The same state, to go on from."""
        return copy.copy(self)

    def _after(self, content: bytes) -> bytes:
        return hashlib.sha256(self._last + content).hexdigest()[:16].encode("ascii")


_SUM = re.compile(rb', "sum": "([0-9a-f]{16})"\}\Z')
_KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "a table"}


def typed(fields: Mapping[str, Any], name: str, kind: type[_T]) -> _T:
    """A field that must be of a type exactly; raises one of `errors.UNREADABLE`."""
    value = fields[name]
    if type(value) is not kind:  # exactly: true is an int to Python
        raise TypeError(f"{name} is {_short(value)}, not {_KINDS[kind]}")
    return value


def _tokens(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    ids = typed(fields, name, list)
    for token in ids:
        if type(token) is not int:
            raise TypeError(f"{name} holds {_short(token)}, not a token id")
    return tuple(ids)


def prompt_id(id: Any) -> str:
    """A prompt's id: a text, or another program's number."""
    if type(id) not in (str, int):
        raise TypeError(f"id is {_short(id)}, not a text")
    return str(id)


def _short(value: Any) -> str:
    return shortened(json.dumps(value, ensure_ascii=False), 80)
