"""Marks: what a gold completion computes, and what it repeats (`Example.marks`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache

from spd_lens.examples import Span

NUMBER = re.compile(r"(?<![\w.])(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
"""A number of its own as solutions write it, without its sign and unit."""


def copies(text: str, spans: Sequence[Span]) -> tuple[Span, ...]:
    """Those of `spans` whose characters stand earlier in `text`, as a word or number of their own."""
    return tuple(span for span in spans if stands_in(text[slice(*span)].strip(), text[: span[0]]))


def firsts(text: str, spans: Sequence[Span]) -> tuple[Span, ...]:
    """Those of `spans` whose value stands in `text` for the first time, each place once and in order."""
    repeated = copies(text, spans)
    return tuple(sorted({span for span in spans if span not in repeated}))


def stands_in(value: str, text: str) -> bool:
    """Whether `value` occurs in `text` as a word or number of its own: 5 does not in 15, 1.5 or 5,000. A number also
    occurs where it is written in another way, as 1,000 in 1000.00."""
    number = value_of(value)
    if isinstance(number, Decimal):
        return number in map(value_of, NUMBER.findall(text))
    if not value or value not in text:
        return False
    # beside a digit, a digit behind a point or comma is of the same number: 5 % does not stand in 1.5 %
    before = r"(?<!\w)(?<!\d[.,])" if value[0].isdigit() else r"(?<!\w)"
    after = r"(?!\w|[.,]\d)" if value[-1].isdigit() else r"(?!\w)"
    return re.search(f"{before}{re.escape(value)}{after}", text) is not None


@lru_cache(maxsize=4096)
def value_of(text: str) -> Decimal | str:
    """What makes two texts the same value: a number's size, however it is written; of any other text, the text."""
    bare = text.strip().removeprefix("$")
    return Decimal(bare.replace(",", "")) if NUMBER.fullmatch(bare) else text
