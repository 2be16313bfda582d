"""`Example`: a prompt, its gold completion and the characters of the completion that decide correctness."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_lens.errors import SPDError

Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """One worked example (paper section 3.1), or, with an empty completion, one prompt."""

    prompt: str
    """What the model is asked: plain text, before any chat template."""
    completion: str = ""
    """The gold answer, as it follows the prompt. Empty for a prompt without a known answer."""
    spans: tuple[Span, ...] = ()
    """Character ranges `(start, end)` **in the completion** that decide correctness (paper A.1, table 6)."""
    id: str = ""
    """Names the example in results and seeds its sampling noise: unique within a task."""
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)
    """What a task's scorer needs beside the completion: tests, subject, choices."""

    def __post_init__(self) -> None:
        spans = tuple((int(start), int(end)) for start, end in self.spans)
        object.__setattr__(self, "spans", spans)  # the dataclass is frozen; lists from JSON become tuples here
        for start, end in spans:
            if not 0 <= start < end <= len(self.completion):
                raise SPDError(
                    f"span ({start}, {end}) of example {self.id or self.prompt[:40]!r} does not lie in its completion "
                    f"of {len(self.completion)} characters; give character positions 0 <= start < end <= length"
                )


def as_examples(prompts: Iterable[str | Example]) -> Sequence[Example]:
    """Prompts as records: a plain string gets its position as id.

    Raises `SPDError` if two records share an id, since ids name results and seed the sampling noise.
    """
    records = [
        prompt if isinstance(prompt, Example) and prompt.id else _with_id(prompt, str(position))
        for position, prompt in enumerate(prompts)
    ]
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise SPDError(f"two prompts share the id {record.id!r}; give every prompt an id of its own")
        seen.add(record.id)
    return records


def _with_id(prompt: str | Example, id: str) -> Example:
    if isinstance(prompt, Example):
        return Example(prompt.prompt, prompt.completion, prompt.spans, id, prompt.meta)
    return Example(prompt, id=id)
