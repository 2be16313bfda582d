"""Which tokens count as correctness: every example token by token, the size of `S`, and what looks wrong with it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from spd_lens.errors import SPDError, shortened
from spd_lens.examples import Example, Span, worked_examples
from spd_lens.models import JointText, Loss, PromptFormat, SpanRule, overlapping
from spd_lens.tasks import copies, stands_in

FlagKind = Literal["unusable", "empty", "whole", "begins-inside", "ends-inside", "in-prompt", "copied", "shared"]

KINDS: dict[FlagKind, str] = {
    "unusable": "cannot be used",
    "empty": "no span, or one of white space",
    "whole": "the whole completion is the span",
    "begins-inside": "a span begins inside a token",
    "ends-inside": "a span ends inside a token",
    "in-prompt": "an answer stands in the prompt too",
    "copied": "an answer stands earlier in the completion",
    "shared": "prompt and completion share a token",
}
"""What each kind of flag means."""

PAPER_SIZES: dict[str, tuple[int, int]] = {"mbpp": (5, 20), "mmlu": (1, 1), "gsm8k": (1, 3)}
"""The typical range of `|S|` in the paper (table 6), by task."""

_MOST_BARS = 12
# 5 and 21 are edges so that the paper's 5-20 is made of whole bars
_EDGES = (1, 2, 3, 5, 10, 21, 51, 101, 201, 501, 1001, 2001, 5001)


@dataclass(frozen=True)
class Piece:
    """One token, or characters that no token covers. The texts of all pieces in a row are the whole text."""

    text: str
    """Its characters. A character that is split over several tokens stands in the first of them; the others have `""`,
    as special tokens without text do."""
    id: int | None
    """Token id; None for characters that the tokenizer dropped."""
    token: str
    """The tokenizer's own spelling of the token, `""` where there is none."""
    position: int | None
    """Place in the sequence, counted from 0."""
    in_completion: bool
    scored: bool


@dataclass(frozen=True)
class Flag:
    """Something about an example's spans that a reader should know."""

    kind: FlagKind
    text: str
    """A sentence with the value and the token."""
    suspicious: bool = True
    """False for what is as a rule harmless, such as the blank before a word that the word's token includes."""


@dataclass(frozen=True)
class AuditedExample:
    """An example as the loss sees it."""

    example: Example
    pieces: tuple[Piece, ...]
    """The whole sequence, chat template included; empty if the text could not be tokenised."""
    flags: tuple[Flag, ...]
    copied: int = 0
    """Scored tokens of the completion whose span stands earlier in it, as a word or number of its own."""

    @property
    def size(self) -> int:
        """`|S|`, the number of scored tokens."""
        return sum(piece.scored for piece in self.pieces)

    @property
    def suspicious(self) -> bool:
        return any(flag.suspicious for flag in self.flags)

    @property
    def places(self) -> tuple[float, ...]:
        """Where in the completion each scored token lies: 0 is the completion's beginning, 1 its end."""
        tokens = [piece for piece in self.pieces if piece.in_completion and piece.id is not None]
        return tuple((place + 0.5) / len(tokens) for place, piece in enumerate(tokens) if piece.scored)


@dataclass(frozen=True)
class Bin:
    """One bar of a histogram."""

    low: float
    high: float
    """The last value inside for whole numbers, the first value outside for fractions."""
    count: float


@dataclass(frozen=True)
class Audit:
    """All examples, and how their spans are distributed."""

    examples: tuple[AuditedExample, ...]
    loss: Loss
    task: str = ""
    span_rule: SpanRule = "overlap"

    @property
    def sizes(self) -> tuple[int, ...]:
        """`|S|` of each example that has any scored token."""
        return tuple(item.size for item in self.examples if item.size)

    @property
    def suspicious(self) -> tuple[AuditedExample, ...]:
        return tuple(item for item in self.examples if item.suspicious)

    @property
    def paper_sizes(self) -> tuple[int, int] | None:
        """The paper's typical `|S|` for this task (table 6); None where it gives none."""
        return PAPER_SIZES.get(self.task) if self.loss == "aligned" else None

    @property
    def share_in_paper_sizes(self) -> float | None:
        """Share of examples whose `|S|` lies in the paper's typical range, among those with any scored token."""
        if not self.paper_sizes or not self.sizes:
            return None
        low, high = self.paper_sizes
        return sum(low <= size <= high for size in self.sizes) / len(self.sizes)

    @property
    def share_copied(self) -> float | None:
        """Share of all scored tokens that can be copied from earlier in their completion; None without spans."""
        if self.loss != "aligned" or not self.sizes:
            return None
        return sum(item.copied for item in self.examples) / sum(self.sizes)

    def flag_counts(self) -> dict[FlagKind, tuple[int, int]]:
        """Number of examples with a flag of each kind: suspicious ones, and those with harmless ones only."""
        bad = Counter(kind for item in self.examples for kind in {flag.kind for flag in item.flags if flag.suspicious})
        every = Counter(kind for item in self.examples for kind in {flag.kind for flag in item.flags})
        return {kind: (bad[kind], every[kind] - bad[kind]) for kind in KINDS if every[kind]}

    def size_bins(self) -> tuple[Bin, ...]:
        """Histogram of `|S|`: a bar per number, or, where they range widely, bars that widen with `|S|`."""
        if not self.sizes:
            return ()
        low, high = min(self.sizes), max(self.sizes)
        edges = list(range(low, high + 2)) if high - low < _MOST_BARS else [e for e in _EDGES if e <= high] + [high + 1]
        bars = [(first, after - 1) for first, after in pairwise(edges) if after > low]
        return tuple(Bin(first, last, sum(first <= size <= last for size in self.sizes)) for first, last in bars)

    def place_bins(self, n_bins: int = 10) -> tuple[Bin, ...]:
        """Where in the completion the loss looks: every example weighs 1, spread over its scored tokens (Eq. 6).

        Those in prompts are left out here; there are no bars where all of them are.
        """
        weights = [0.0] * n_bins
        for item in self.examples:
            for place in item.places:
                weights[int(place * n_bins)] += 1 / item.size
        bars = (Bin(i / n_bins, (i + 1) / n_bins, weight) for i, weight in enumerate(weights))
        return tuple(bars) if any(weights) else ()

    def summary(self) -> dict[str, Any]:
        """Plain numbers, for a report or a data card."""
        sizes = self.sizes
        return {
            "examples": len(self.examples),
            "scored": len(sizes),
            "span_tokens": {"min": min(sizes), "median": median(sizes), "max": max(sizes)} if sizes else {},
            "paper_span_tokens": self.paper_sizes,
            "share_in_paper_range": self.share_in_paper_sizes,
            "share_copied": self.share_copied,
            "suspicious": len(self.suspicious),
            "flags": {kind: {"suspicious": bad, "notes": notes} for kind, (bad, notes) in self.flag_counts().items()},
        }


def audit(examples: Iterable[Example], format: PromptFormat, loss: Loss = "aligned", *, task: str = "") -> Audit:
    """Tokenise examples as the loss does, and look at what it scores.

    Args:
        examples: Prompts with gold completions and spans. An example that cannot be used is flagged, with the reason.
        format: Tokenizer and form of the prompt, such as `pair.format` or `PromptFormat.choose(tokenizer)`.
        loss: `"aligned"`, or `"full"`, for which whole completions are scored and spans are not looked at.
        task: Name of the task, to compare `|S|` with table 6 of the paper.
    """
    if loss not in ("aligned", "full"):
        raise SPDError(f"unknown loss {loss!r}; choose 'aligned' or 'full'")
    found = tuple(_audited(example, format, loss) for example in worked_examples(examples))
    return Audit(found, loss, task, format.span_rule)


def _audited(example: Example, format: PromptFormat, loss: Loss) -> AuditedExample:
    try:
        joint = format.joint(example)
    except SPDError as error:
        return AuditedExample(example, (), (Flag("unusable", str(error)),))
    flags: list[Flag] = []
    start = next((i for i, (low, high) in enumerate(joint.offsets) if low < high > joint.completion_at), len(joint.ids))
    scored: list[int] = []
    copied: tuple[int, ...] = ()
    repeated = copies(example.completion, example.spans)
    if loss == "aligned" and example.completion and not example.measurable:
        flags.append(Flag("empty", "no span says which characters decide correctness"))
    else:
        try:
            encoded = format.encode(replace(example, marks={"copied": repeated}), loss)
            start, scored, copied = encoded.completion_start, encoded.scored, encoded.marked.get("copied", ())
        except SPDError as error:
            flags.append(Flag("unusable", str(error)))
    pieces = tuple(_pieces(joint, start, set(scored), format.tokenizer))
    if scored:
        flags += _shared(joint)
    if scored and loss == "aligned":
        spans = [(low, high) for _, _, low, high in format.places(example, joint)]
        flags += [*_blank(example), *_whole(pieces), *_cut_tokens(spans, joint, format.span_rule), *_in_prompt(example)]
        flags += _copied(example, repeated)
    return AuditedExample(example, pieces, tuple(flags), len(set(copied) & set(scored)))


def _pieces(joint: JointText, start: int, scored: set[int], tokenizer: Any) -> Iterable[Piece]:
    tokens = tokenizer.convert_ids_to_tokens(joint.ids)
    at = 0  # characters before this one stand in a piece already
    for position, (id, token, (low, high)) in enumerate(zip(joint.ids, tokens, joint.offsets, strict=True)):
        if at < low < high:
            yield Piece(joint.text[at:low], None, "", None, at >= joint.completion_at, False)
            at = low
        text = ""
        if low < high:  # else the token has no characters of its own
            text, at = joint.text[at:high], max(at, high)
        yield Piece(text, id, token, position, position >= start, position in scored)
    if at < len(joint.text):
        yield Piece(joint.text[at:], None, "", None, at >= joint.completion_at, False)


def _shared(joint: JointText) -> Iterable[Flag]:
    if joint.shared is None:
        return
    low, high = joint.offsets[joint.shared]
    border = joint.completion_at
    yield Flag(
        "shared",
        f"token {joint.shared} {joint.text[low:high]!r} begins in the prompt with {joint.text[low:border]!r} and ends "
        f"in the completion with {joint.text[border:high]!r}, which generation from the prompt cannot produce; it "
        "counts as the completion's",
    )


def _blank(example: Example) -> Iterable[Flag]:
    for what, spans, text in (
        ("span", example.spans, example.completion),
        ("prompt span", example.prompt_spans, example.prompt),
    ):
        for low, high in spans:
            if text[low:high].isspace():
                yield Flag("empty", f"{what} ({low}, {high}) holds nothing but white space")


def _whole(pieces: Sequence[Piece]) -> Iterable[Flag]:
    completion = [piece for piece in pieces if piece.in_completion]
    n = sum(piece.scored for piece in completion)
    if n and all(piece.scored for piece in completion if piece.text.strip()):
        yield Flag("whole", f"the span is the whole completion, {n} token{'s' if n > 1 else ''}")


def _cut_tokens(spans: Sequence[Span], joint: JointText, rule: SpanRule) -> Iterable[Flag]:
    """Tokens that lie in a span only in part; `spans` are characters of the joint text."""
    blanks: dict[FlagKind, list[str]] = {"begins-inside": [], "ends-inside": []}
    for low, high in spans:
        value = _short(joint.text[low:high])
        covered = overlapping(joint.offsets, low, high)
        first, last = joint.offsets[covered[0]], joint.offsets[covered[-1]]
        extras: tuple[tuple[FlagKind, int, str], ...] = (
            ("begins-inside", covered[0], joint.text[first[0] : low]),
            ("ends-inside", covered[-1], joint.text[high : last[1]]),
        )
        for kind, token, extra in extras:
            shown = f"token {token} {_short(joint.text[slice(*joint.offsets[token])])}"
            how = kind.replace("-", " ")
            if extra and rule == "inside":
                yield Flag(kind, f"span {value} {how} {shown}, which is not scored: it does not lie inside the span")
            elif extra.isspace():
                blanks[kind].append(shown)
            elif extra:
                yield Flag(kind, f"span {value} {how} {shown}: {_short(extra)} is scored too")
    # most tokenizers put the blank before a word into its token: one remark is enough
    for kind, tokens in blanks.items():
        if tokens:
            side = "before" if kind == "begins-inside" else "after"
            yield Flag(kind, f"white space {side} a span is scored with it: {_listed(tokens)}", suspicious=False)


def _in_prompt(example: Example) -> Iterable[Flag]:
    values = list(dict.fromkeys(example.completion[low:high].strip() for low, high in example.spans))
    values = [value for value in values if value]
    seen = [value for value in values if stands_in(value, example.prompt)]
    if seen:
        shown = _listed([_short(value) for value in seen])
        count = f"{len(seen)} of {len(values)} answers: " if len(values) > 1 else ""
        # the letter of a choice stands before it, right or wrong: there is nothing to copy
        letters = all(re.fullmatch(r"\(?[A-Z]\)?", value) for value in seen)
        yield Flag("in-prompt", f"{count}{shown} can be read in the prompt", suspicious=not letters)


def _copied(example: Example, repeated: Sequence[Span]) -> Iterable[Flag]:
    """A remark, since the answer of nearly every worked solution is one: the share of all examples is what counts."""
    values = dict.fromkeys(example.completion[low:high].strip() for low, high in repeated)
    if values:
        count = f"{len(repeated)} of {len(example.spans)} spans: " if len(example.spans) > 1 else ""
        shown = _listed([_short(value) for value in values])
        yield Flag("copied", f"{count}{shown} can be copied from earlier in the completion", suspicious=False)


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


def _short(text: str) -> str:
    return repr(shortened(text, 40))
