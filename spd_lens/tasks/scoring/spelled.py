"""Numbers in English words: `twenty-three`, `two hundred and five`, `three quarters`, `two and a half`."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SMALL = {word: value for value, word in enumerate(_UNITS)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
_LARGE = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_PARTS = dict(
    zip("half halves third quarter fourth fifth sixth eighth tenth".split(), (2, 2, 3, 4, 4, 5, 6, 8, 10), strict=True)
)
_WORD = "|".join(sorted([*_SMALL, *_LARGE], key=len, reverse=True))
_PART = "|".join(sorted(_PARTS, key=len, reverse=True))
SPELLED = re.compile(
    rf"\b(?:(?:negative|minus)\s)?(?:(?:an?|{'|'.join(_UNITS[1:11])})[ -](?:{_PART})s?\b"
    r"|half\b(?=\s+(?:an?|of|the)\b|\W*$)"
    rf"|(?:(?:a\s(?={'|'.join(_LARGE)}))?(?:{_WORD})\b(?:(?:\sand\s|[ -])(?:{_WORD})\b){{0,12}}"
    rf"(?:\sand\sa\s(?:{_PART})\b)?)"
    r"(?P<percent>\s(?:percent|per\scent))?(?!\s(?:of|that|which|who|can|must|should)\b))",
    re.IGNORECASE,
)
"""A number in words; `one of them` is none."""


def spelled_value(text: str) -> list[Fraction]:
    """The value of the number in words that `text` begins with; nothing without one."""
    match = SPELLED.match(text)
    if match is None:
        return []
    words = re.split(r"[\s-]+", match.group().lower().removesuffix(match["percent"] or ""))
    negative = words[0] in ("negative", "minus")
    total = group = Fraction(0)
    for word in words[negative:]:
        if word in _SMALL:
            group += _SMALL[word]
        elif word == "hundred":
            group = (group or Fraction(1)) * 100
        elif word in _LARGE:
            total, group = total + (group or Fraction(1)) * _LARGE[word], Fraction(0)
        elif part := _PARTS.get(word) or _PARTS.get(word.removesuffix("s")):
            mixed = " and a " in match.group().lower()
            group = group + Fraction(1, part) if mixed else (group or Fraction(1)) / part
    total += group
    total = -total if negative else total
    return [total, total / 100] if match["percent"] else [total]
