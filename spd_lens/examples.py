"""`Example`: a prompt, its gold completion and the characters of the completion that decide correctness."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

from spd_lens.errors import SPDError, plain, shortened

Span = tuple[int, int]

_AS_EXAMPLES = 'write [Example(row["question"], row["answer"]) for row in rows], with the names of your own columns'


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
    """Names the example in results and seeds its sampling noise: unique within a task. Whole numbers and UUIDs are
    kept as their text, so that `7` and `"7"` are one id; None is no id."""
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False, hash=False)
    """What a task's scorer needs beside the completion: tests, subject, choices."""
    prompt_spans: tuple[Span, ...] = ()
    """Character ranges `(start, end)` **in the prompt** that decide correctness too, such as asserts it shows."""
    marks: Mapping[str, tuple[Span, ...]] = field(default_factory=dict, compare=False, hash=False)
    """Character ranges in the completion by what they are: `results`, values where they are computed, and `copies`,
    the part of the answer that stands earlier in the completion. They say what a loss is about, and decide none."""

    def __post_init__(self) -> None:
        # the dataclass is frozen; numpy's texts and numbers, and lists from JSON, become Python's own here
        object.__setattr__(self, "id", id_text(self.id))
        for name in ("prompt", "completion"):
            object.__setattr__(self, name, self._text(name))
        for name, of in (("spans", "completion"), ("prompt_spans", "prompt")):
            given = self._spans(name, getattr(self, name))
            object.__setattr__(self, name, tuple(self._span(span, name, of) for span in given))
        object.__setattr__(self, "marks", dict(self._marks()))

    @property
    def measurable(self) -> bool:
        """Whether it has an aligned loss: a completion, and spans in the completion or in the prompt."""
        return bool(self.completion and (self.spans or self.prompt_spans))

    @property
    def name(self) -> str:
        """What a message calls it: the id, or how the prompt begins."""
        return f"example {self.id or self.prompt[:40]!r}"

    def _text(self, name: str) -> str:
        value = getattr(self, name)
        if not isinstance(value, str):
            raise SPDError(
                f"the {name} of example {self.id or '(no id)'!r} is {_shown(value)}, not a text; {_AS_EXAMPLES}"
            )
        return str(value)

    def _marks(self) -> Iterator[tuple[str, tuple[Span, ...]]]:
        if not isinstance(self.marks, Mapping):
            raise SPDError(
                f"the marks of {self.name} are {_shown(self.marks)}; give a mapping of kinds to spans, as in "
                "marks={'results': [(6, 7)]}"
            )
        for kind, given in self.marks.items():
            if spans := self._spans(f"marks {kind!r}", given):
                yield str(kind), tuple(self._span(span, f"mark {kind!r}", "completion") for span in spans)

    def _spans(self, name: str, value: Any) -> Sequence[Any]:
        spans: Any = plain(value)
        if not isinstance(spans, list | tuple):
            raise SPDError(f"the {name} of {self.name} are {_shown(spans)}; give pairs, as in {name}=[(6, 7)]")
        if len(spans) == 2 and all(type(end) is int for end in spans):
            raise SPDError(f"the {name} of {self.name} are {tuple(spans)}; one span is written {name}=[{tuple(spans)}]")
        return spans

    def _span(self, span: Any, name: str, of: str) -> Span:
        what = name.replace("_", " ").removesuffix("s")
        if not isinstance(span, list | tuple) or len(span) != 2 or any(type(end) is not int for end in span):
            raise SPDError(
                f"{self.name} has the {what} {_shown(span)}; a span is a pair of whole numbers, as in (6, 7)"
            )
        start, end = span
        length = len(getattr(self, of))
        if not 0 <= start < end <= length:
            raise SPDError(
                f"{what} ({start}, {end}) of {self.name} does not lie in its {of} of {length} characters; "
                "give character positions 0 <= start < end <= length"
            )
        return start, end


def id_text(value: Any) -> str:
    """An id as the text under which it is kept; `""` for None.

    Raises:
        SPDError: it is neither a text, a whole number nor a UUID, or holds half a character.
    """
    id = plain(value)
    if id is None:
        return ""
    if not isinstance(id, str | uuid.UUID) and type(id) is not int:
        raise SPDError(f"the id {_shown(id)} is neither a text nor a whole number; write id=str(...)")
    return whole_characters(str(id), f"the id {str(id)[:40]!r}")


def as_examples(prompts: Iterable[str | Example] | str | Example) -> list[Example]:
    """Prompts as records: a plain string gets its position as id.

    Raises:
        SPDError: something that is neither a text nor an `Example`; or two records share an id, since ids name results
            and seed the sampling noise.
    """
    made = [prompt if isinstance(prompt, Example) else Example(prompt) for prompt in _elements(prompts, "prompts")]
    records = [prompt if prompt.id else replace(prompt, id=str(position)) for position, prompt in enumerate(made)]
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise SPDError(f"two prompts share the id {record.id!r}; give every prompt an id of its own")
        seen.add(record.id)
    return records


def worked_examples(examples: Iterable[Example] | Example, what: str = "examples") -> list[Example]:
    """Examples where texts alone would not do, since gold completions are needed; `what` is what a message calls them.

    Raises:
        SPDError: something that is no `Example`.
    """
    found = _elements(examples, what)
    for position, example in enumerate(found):
        if not isinstance(example, Example):
            raise SPDError(
                f"{what}[{position}] is a text alone, {_shown(example)}; "
                "write Example(prompt, completion, spans=[(start, end)])"
            )
    return found


def _elements(given: Any, what: str) -> list[Any]:
    """The texts and examples in what was given, in order; one that is given alone is a list of one."""
    if isinstance(given, str | Example):
        return [given]
    if isinstance(given, Mapping | AbstractSet | bytes | bytearray) or hasattr(given, "columns"):
        # iterated over, these give keys, columns, numbers, or the same texts in another order each time
        raise SPDError(f"{what} is a {type(given).__name__}, not a list of texts or Examples; {_AS_EXAMPLES}")
    try:
        elements = list(given)
    except TypeError as error:
        raise SPDError(f"{what} is {_shown(given)}, not a list of texts or Examples; {_AS_EXAMPLES}") from error
    for position, element in enumerate(elements):
        if isinstance(element, Mapping) and "role" in element:
            raise SPDError(
                f"{what}[{position}] is a message of a chat; give the user's text alone, as one prompt: the chat "
                "template is applied here, and a system message is an option of load"
            )
        if not isinstance(element, str | Example):
            raise SPDError(f"{what}[{position}] is {_shown(element)}, neither a text nor an Example; {_AS_EXAMPLES}")
    return elements


def _shown(value: Any) -> str:
    """A value in a message: its type, and what it is as far as that is short."""
    text = shortened(" ".join(repr(value).split()))
    return text if value is None else f"the {type(value).__name__} {text}"


def whole_characters(text: str, what: str) -> str:
    """The text; `SPDError` if it holds half a character, which JSON can spell and no encoding takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SPDError(
            f"{what} holds half a character ({text[error.start]!r}), which no tokenizer reads and no file holds; mend "
            "or leave out the record"
        ) from error
    return text
