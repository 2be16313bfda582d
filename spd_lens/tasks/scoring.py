"""Reading the answer out of a completion, and deciding whether it is right.

Everything here works on plain text and is a pure function; `tests/tasks/test_scoring.py` has a table of tricky cases
for each.
"""

from __future__ import annotations

import re
import threading
from fractions import Fraction

_SPACES = "\u00a0\u2007\u2009\u202f"  # spaces that only ever stand inside a number or before a unit
_DIGITS = rf"(?:\d{{1,3}}(?:[,{_SPACES}]\d{{3}})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{{1,3}}(?![\w]))?"
_CURRENCY = r"(?:\\?\$|US\$|€|£|¥|₹|USD|EUR|GBP)"
NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]}}])[-+])?\s?(?:{_CURRENCY}\s?)?(?P<inner>(?<=[$€£¥₹])-)?"
    rf"(?:\\[dt]?frac\{{\s*(?P<top>-?{_DECIMAL})\s*\}}\{{\s*(?P<bottom>{_DECIMAL})\s*\}}"
    rf"|(?P<whole>\d+)\s(?P<part>\d+/\d+)(?![\d/])"
    rf"|(?P<over>{_DECIMAL}\s?/\s?{_DECIMAL})(?![\d/])"
    rf"|(?P<plain>{_DECIMAL}))"
    r"(?P<percent>\s?\\?%)?(?:\s(?P<scale>thousand|million|billion)\b)?",
)
"""A number as people and models write it: `-1,234.50`, `$3`, `3/4`, `1 1/2`, `\\frac{3}{4}`, `50%`, `2 million`."""
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}

_LEAD = r"[\s*_`:\\({\[\"']*"  # markdown and LaTeX that may stand between a marker and the answer
_HASHES = re.compile(r"####(?P<rest>[^\n]*)")
_PREAMBLE = re.compile(rf"^{_LEAD}(?:(?:the\s+)?(?:final\s+)?answer(?:\s+is)?{_LEAD})?", re.IGNORECASE)
_ANSWER_IS = re.compile(r"\banswer\b(?:\s+is\b|\s*:|\s*=|\*\*\s*:|:\s*\*\*)(?P<rest>[^\n]*)", re.IGNORECASE)


def tidy(text: str) -> str:
    """`text` with the typographic variants of minus and slash that models produce made plain."""
    return text.replace("\u2212", "-").replace("\u2013", "-").replace("\u2044", "/").replace("\uff0c", ",")


def final_number(text: str) -> str | None:
    """The number that a worked solution ends on, as it is written; `None` if there is none.

    After the last `####`; else in the last `\\boxed{}`; else after the last "answer is" or "answer:"; else the last
    number of the text. A `####` line counts only if it starts with a number (or ends on "= number"): models also write
    `#### Step 2` as a heading.
    """
    text = tidy(text)
    for match in reversed(list(_HASHES.finditer(text))):
        if (found := _number_of_line(match["rest"])) is not None:
            return found
    if (box := last_box(text)) is not None:
        found = _last_number(box.rpartition("=")[2])
        return box if _is_expression(box) or found is None else found
    for match in reversed(list(_ANSWER_IS.finditer(text))):
        if (found := _first_number(match["rest"].rpartition("=")[2])) is not None:
            return found
    return _last_number(text)


def same_number(gold: str, answer: str | None) -> bool:
    """Whether two written numbers have the same value: `1,000` and `$1000.00`; `0.5`, `1/2` and `50%`.

    Units and currency count for nothing. A percentage equals both its figure and its value, since gold answers are
    written either way. What is not a plain number (`2\\sqrt{3}`) is compared by `math-verify`, where that is installed.
    """
    if answer is None:
        return False
    golds, answers = values(gold), values(answer)
    if golds and answers and not _is_expression(answer):
        return any(_close(one, other) for one in golds for other in answers)
    return _same_expression(gold, answer)


def values(text: str) -> list[Fraction]:
    """What the first number in `text` can stand for: nothing, one value, or two for a percentage."""
    match = NUMBER.search(tidy(text).strip())
    if match is None or len(match.group()) > 100:  # nobody's answer, and slow (or refused by Python) as an integer
        return []
    try:
        value = _value(match)
    except ZeroDivisionError:
        return []
    if match["sign"] == "-" or match["inner"]:
        value = -value
    value *= _SCALES.get(match["scale"] or "", 1)
    return [value, value / 100] if match["percent"] else [value]


def _value(match: re.Match[str]) -> Fraction:
    if match["top"]:
        return _plain(match["top"]) / _plain(match["bottom"])
    if match["whole"]:
        return Fraction(match["whole"]) + Fraction(match["part"])
    if match["over"]:
        top, bottom = match["over"].split("/")
        return _plain(top) / _plain(bottom)
    return _plain(match["plain"])


def _plain(text: str) -> Fraction:
    return Fraction(re.sub(rf"[,{_SPACES}\s]", "", text))


def _close(one: Fraction, other: Fraction) -> bool:
    # exact for whole numbers and short decimals; the tolerance lets 0.333333 be 1/3
    return one == other or abs(one - other) <= Fraction(1, 10**6) * max(abs(one), abs(other))


def _number_of_line(line: str) -> str | None:
    """The number that the rest of a `####` line gives."""
    if "=" in line:
        return _first_number(line.rpartition("=")[2])
    start = _PREAMBLE.match(line)
    assert start is not None  # the pattern matches the empty string
    match = NUMBER.match(line, start.end())
    if match is None or re.match(r"[.):]\s*[^\W\d]", line[match.end() :]):  # "#### 1. Read the problem" is a heading
        return None
    return match.group().strip()


def _first_number(text: str) -> str | None:
    match = NUMBER.search(text)
    return match.group().strip() if match else None


def _last_number(text: str) -> str | None:
    matches = list(NUMBER.finditer(text))
    return matches[-1].group().strip() if matches else None


def last_box(text: str) -> str | None:
    """What stands in the last `\\boxed{...}`, with braces matched; `None` without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin = depth = start + len("\\boxed{")
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position].strip()
    return text[begin:].strip() or None


def _is_expression(text: str) -> bool:
    """Whether `text` is more than a number with a unit, so that its first number is not its value."""
    rest = NUMBER.sub("", text, count=1)
    return bool(re.search(r"\\(?:sqrt|pi|cdot|times|d?frac)|[\d^*+]|\d\s*[-/]", rest))


def _same_expression(gold: str, answer: str) -> bool:
    """Equality of two LaTeX expressions by `math-verify`."""
    if max(len(gold), len(answer)) > 100 or "^" in answer or "!" in answer:
        return False  # a tower of powers would keep sympy busy for hours
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    # its time limit is a Unix signal, which only the main thread may set
    limit = 2 if threading.current_thread() is threading.main_thread() else None
    one = parse(f"${gold}$", parsing_timeout=limit, raise_on_error=False)
    other = parse(f"${answer}$", parsing_timeout=limit, raise_on_error=False)
    return bool(one and other and verify(one, other, timeout_seconds=limit, raise_on_error=False))
