"""The values of written numbers, and whether two of them are the same."""

from __future__ import annotations

import re
import threading
import unicodedata
from fractions import Fraction

from spd_lens.tasks.scoring.reading import tidy
from spd_lens.tasks.scoring.spelled import spelled_value

_SPACES = "\u00a0\u2007\u2009\u202f"  # spaces that only ever stand inside a number or before a unit
_DIGITS = rf"(?:\d{{1,3}}(?:[,'’_{_SPACES}]\d{{3}})+(?!\d)|\d{{1,2}}(?:,\d{{2}}){{1,4}},\d{{3}}(?!\d)|\d+)"
DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{{1,3}}(?![\w]))?"
CURRENCY = r"(?:\\?\$|US\$|[€£¥₹₽₩₺₫₱]|USD|EUR|GBP|INR|Rs\.?)"
_TIMES = r"(?:\\times|\\cdot|×|·|\*|x)"
NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]}}])[-+]|\b[Nn]egative\s)?(?:{CURRENCY}\s?)?(?P<inner>(?<=[$€£¥₹])-)?"
    rf"(?:\\[dtc]?frac\{{\s*(?P<top>-?{DECIMAL})\s*\}}\{{\s*(?P<bottom>{DECIMAL})\s*\}}"
    rf"|(?P<whole>\d+)(?:\s(?P<part>\d+/\d+)(?![\d/])|\s?\\[dtc]?frac\{{(?P<part_top>\d+)\}}\{{(?P<part_bottom>\d+)\}})"
    rf"|(?P<mantissa>{DECIMAL})\s?{_TIMES}\s?10\s?(?:\^|\*\*)\s?\{{?(?P<power>[-+]?\d{{1,2}})(?!\d)\}}?"
    rf"|(?P<over>{DECIMAL}\s?/\s?{DECIMAL})(?![\d/])"
    r"|(?P<continental>\d{1,3}(?:\.\d{3}){1,4},\d{1,2}(?!\d))"
    r"|(?P<comma>(?<![\d,.])\d+,\d{1,2}(?![\d,]|\.\d))"
    rf"|(?P<plain>{DECIMAL}))"
    r"(?:[kK]\b(?P<kilo>))?(?P<percent>\s?\\?%|\s?(?:percent|per\scent|pct)\b)?"
    r"(?:\s(?P<scale>hundred|thousand|million|billion|trillion|dozen)\b)?",
)
"""A number as people and models write it: `-1,234.50`, `$3`, `3/4`, `\\frac{3}{4}`, `1 1/2`, `50%`, `7 × 10^4`."""
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

HARMLESS = re.compile(
    r"(?=.{1,100}$)(?=[^^]*(?:\^[^^]*){0,2}$)"
    r"(?:[\d.,+\-/(){}\s]|\*(?!\*)|\^\{?[-+]?\d{1,2}\}?(?![\d^{(])|\\(?:sqrt|[dtc]?frac|cdot|times|div|pi|left|right)(?![a-zA-Z]))+",
    re.DOTALL,
)
"""LaTeX that a computer algebra system is done with at once."""


def same_number(gold: str, answer: str | None) -> bool:
    """Whether two written numbers have the same value: `1,000` and `$1000.00`; `0.5`, `1/2` and `50%`.

    Units and currency count for nothing. A percentage equals both its figure and its value, since gold answers are
    written either way, and `3 dozen` both 3 and 36. What is not a plain number (`2\\sqrt{3}`, `2^4`) is compared by
    `math-verify`, where that is installed.
    """
    if answer is None:
        return False
    if gold.strip() and plain_numbers(gold).split() == plain_numbers(answer).split():
        return True
    return same_value(gold, answer) or (
        any(is_expression(plain_numbers(text)) for text in (gold, answer)) and _same_expression(gold, answer)
    )


def same_value(gold: str, answer: str) -> bool:
    """The same as `same_number`, except that an expression to be worked out (`5 + 3`) has no value."""
    if any(is_expression(plain_numbers(text)) for text in (gold, answer)):
        return False
    return any(_close(one, other) for one in values(gold) for other in values(answer))


def is_number(text: str) -> bool:
    """Whether the whole of `text` is one number. `1,2` may be two."""
    match = NUMBER.fullmatch(text)
    return match is not None and not match["comma"]


def values(text: str) -> list[Fraction]:
    """What the first number in `text` can stand for: nothing, one value, or two for a percentage or dozens."""
    text = plain_numbers(text).strip()
    match = NUMBER.search(text)
    if match is None:
        return spelled_value(text)
    if len(match.group()) > 100:  # no sensible answer, and slow (or refused by Python) as an integer
        return []
    try:
        value = _value(match)
    except ZeroDivisionError:
        return []
    if (match["sign"] or "+") != "+" or match["inner"]:
        value = -value
    if match["kilo"] is not None:
        value *= 1000
    if match["scale"] == "dozen":
        return [value, value * 12]
    value *= _SCALES.get(match["scale"] or "", 1)
    return [value, value / 100] if match["percent"] else [value]


def _value(match: re.Match[str]) -> Fraction:
    if match["top"]:
        return _plain(match["top"]) / _plain(match["bottom"])
    if match["whole"]:
        part = Fraction(match["part"]) if match["part"] else Fraction(int(match["part_top"]), int(match["part_bottom"]))
        return Fraction(match["whole"]) + part
    if match["mantissa"]:
        return _plain(match["mantissa"]) * Fraction(10) ** int(match["power"])
    if match["over"]:
        top, bottom = match["over"].split("/")
        return _plain(top) / _plain(bottom)
    if decimal := match["continental"] or match["comma"]:
        return _plain(decimal.replace(".", "").replace(",", "."))
    return _plain(match["plain"])


def _plain(text: str) -> Fraction:
    return Fraction(re.sub(rf"[,'’_{_SPACES}\s]", "", text))


def _close(one: Fraction, other: Fraction) -> bool:
    # exact for whole numbers and short decimals; the tolerance lets 0.333333 be 1/3
    return abs(one - other) <= Fraction(1, 10**6) * max(abs(one), abs(other))


def plain_numbers(text: str) -> str:
    """`text` with the ways in which LaTeX and Unicode write plain numbers made plain: `1{,}080`, `45^{\\circ}`, `½`."""
    text = re.sub("[¼-¾⅐-⅞]", lambda match: " " + unicodedata.normalize("NFKC", match[0]), text)
    text = tidy(text.replace("\\!", ""))
    text = re.sub(r"(?<=\d) and a half\b", " 1/2", text)
    text = re.sub(r"(?<=\d)(?:\\text)?\{\\?[,; ]\}(?=\d)|(?<=\d)(?:\\[,;: ]|~)(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"\^\s?\{?\s?\\circ\s?\}?|\\degree\b|[°º]", " ", text)
    text = re.sub(r"(?<=\d)[⁰¹²³⁴-⁹]+", lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    return re.sub(r"\\([dtc]?frac)\s?(\d)\s?(\d)", r"\\\1{\2}{\3}", re.sub(r"\\[,;:]", " ", text))


def is_expression(text: str) -> bool:
    """Whether `text` is more than a number with a unit, so that its first number is not its value."""
    rest = NUMBER.sub("", text, count=1)
    return bool(re.search(r"\\(?:sqrt|pi|cdot|times|div|[dtc]?frac)|[\d^*+]|\d\s*[-/]", rest))


def _same_expression(gold: str, answer: str) -> bool:
    """Equality of two LaTeX expressions by `math-verify`."""
    one_latex, other_latex = (_latex(text) for text in (gold, answer))
    if not all(HARMLESS.fullmatch(text) for text in (one_latex, other_latex)):
        return False  # a tower of powers or a large factorial would keep sympy busy for hours
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    # its time limit is a Unix signal, which only the main thread may set
    limit = 2 if threading.current_thread() is threading.main_thread() else None
    one = parse(f"${one_latex}$", parsing_timeout=limit, raise_on_error=False)
    other = parse(f"${other_latex}$", parsing_timeout=limit, raise_on_error=False)
    return bool(one and other and verify(one, other, timeout_seconds=limit, raise_on_error=False))


def _latex(text: str) -> str:
    text = (
        plain_numbers(text).replace("**", "^").replace("×", "\\times ").replace("÷", "\\div ").replace("·", "\\cdot ")
    )
    return re.sub(r"(?<=\d)\s?[xX]\s?(?=\d)", r" \\times ", text).strip()
