"""Short answers in words, brackets or code, and whether two of them are the same."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Literal

from spd_lens.tasks.scoring.reading import answer_part, boxes, introduces, marks, tidy

_PAIRS = dict(zip("([<{“‘«\"'`*_", ")]>}”’»\"'`*_", strict=True))
_BRACKETS = "([<{"
_MACRO = re.compile(
    r"(?:\\(?:boxed|text\w{0,2}|math\w{2}|mbox)\{(?P<inside>[^{}]*)\}|\\\((?P<inline>.*)\\\)|\$(?P<dollars>[^$]+)\$)\.?"
)
_PREAMBLE = re.compile(
    r"(?:(?:the|my|so|thus|hence|therefore|final|correct|right|best)[\s,]{1,3})*+answer(?:\s{1,3}(?:is|was)\b|\s{0,3}[:=])[\s:*_]*",
    re.IGNORECASE,
)


def short_answer(text: str, *, unmarked: Literal["first", "last"] = "first") -> str | None:
    """A short answer as it is written: after the last "Answer:" or "answer is", else boxed, else the first (or last)
    line. A first line that only introduces ("Let's think step by step:") gives way to the last."""
    text = answer_part(text).strip()
    for mark in reversed(marks(text)):
        rest = mark.rest
        while match := _PREAMBLE.match(rest):
            rest = rest[match.end() :]
        if mark.first and rest and not re.match(r"(?:not|never|neither)\b(?!.{0,60}\bbut\b)", rest):
            return _bare(rest) or None
    for _, box in boxes(text):
        return box
    lines = [line for line in text.split("\n") if line.strip()] or [""]
    last = unmarked == "last" or introduces(lines[0])
    return _bare(lines[-1 if last else 0]) or None


def _bare(text: str) -> str:
    """`text` without bold type and heading marks around the whole of it."""
    text = text.strip()
    for mark in ("**", "`"):
        inside = text[len(mark) : -len(mark)]
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark) and mark not in inside:
            text = inside.strip()
    if text.count("**") == 1 and text.endswith("**"):
        text = text[:-2].strip()
    return re.sub(r"^[-•] +(?=[^\W\d_]{2})", "", text)


def squashed(text: str) -> str:
    """`text` without differences of case, of white space around punctuation, and of typography."""
    text = tidy(unicodedata.normalize("NFC", text)).casefold()
    text = text.replace("“", '"').replace("”", '"').replace("‘", "'").replace("’", "'")
    return re.sub(r" (?=[^\w\s])|(?<=[^\w\s]) ", "", " ".join(text.split()))


def same_text(gold: str, said: str) -> bool:
    """Whether two texts are the same but for case, spaces, outer punctuation, quotes and markdown.

    Brackets and symbols are part of an answer: `[]` is not `()`, `[1, 2]` is not `(1, 2)`, and `f` is not `f()`. One
    pair of brackets around a word, or one mark at its end, may be missing on either side, but not be another: `(B)` is
    `B`, `[Paris]` is `Paris`, and `Stop!` is `Stop`, but not `Stop?`.
    """
    wanted = list(_variants(squashed(gold), gold_side=True))
    return any(
        text == other and all(not one or not two or one == two == "." for one, two in zip(gone, also_gone, strict=True))
        for text, gone in _variants(squashed(said), gold_side=False)
        for other, also_gone in wanted
    )


def _variants(text: str, *, gold_side: bool) -> Iterator[tuple[str, tuple[str, str]]]:
    """`text` and what is left of it as wrapping is taken off, each with the bracket and the mark that were taken."""
    bracket = mark = ""
    for _ in range(8):
        if not text:
            return
        yield text, (bracket, mark)
        wordy = re.search(r"[^\W_]", text) is not None
        if not gold_side and (macro := _MACRO.fullmatch(text)):
            text = next(group for group in macro.groups() if group is not None).strip()
        elif _trailing(text, wordy) and not (gold_side and not wordy):
            mark = "." if text[-1] in ".,。" else text[-1]
            text = text[:-1]
        elif _pair_around(text, wordy, gold_side):
            bracket = text[0] if text[0] in _BRACKETS else bracket
            text = text[1:-1].strip()
        else:
            return


def _trailing(text: str, wordy: bool) -> bool:
    """Whether punctuation ends the sentence that `text` is."""
    if len(text) < 2 or text.endswith(".."):
        return False
    return text[-1] in ".,;:。" or (
        wordy and text[-1] in "!?" and re.search(r"[^\W\d_]{2,}[!?]+$", text[-40:]) is not None
    )


def _pair_around(text: str, wordy: bool, gold_side: bool) -> bool:
    """Whether one pair of quotes, brackets or markdown stands around the whole of `text`, and says nothing."""
    first = text[0]
    if len(text) < 3 or _PAIRS.get(first) != text[-1]:
        return False
    if gold_side and (not wordy or first in "[{<_"):
        return False  # the gold answer is a list, a name like `__init__`, or nothing but symbols
    if first not in _BRACKETS:
        return True
    if not wordy or (text[1] in _BRACKETS and _pair_around(text[1:-1], wordy, gold_side)):
        return False  # `[[]]` is not `[]`
    depth = 0
    for place, character in enumerate(text):
        depth += (character == first) - (character == _PAIRS[first])
        if depth == 0:
            return place == len(text) - 1
    return False
