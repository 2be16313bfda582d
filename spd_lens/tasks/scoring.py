"""Reading the answer out of a completion, and deciding whether it is right.

Everything here works on plain text and is a pure function; `tests/tasks/test_scoring.py` has a table of tricky cases
for each.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

_SPACES = "\u00a0\u2007\u2009\u202f"  # spaces that only ever stand inside a number or before a unit
_DIGITS = rf"(?:\d{{1,3}}(?:[,{_SPACES}]\d{{3}})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{{1,3}}(?![\w]))?"
_CURRENCY = r"(?:\\?\$|US\$|€|£|¥|₹|USD|EUR|GBP)"
NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]}}])[-+])?(?:{_CURRENCY}\s?)?(?P<inner>(?<=[$€£¥₹])-)?"
    rf"(?:\\[dt]?frac\{{\s*(?P<top>-?{_DECIMAL})\s*\}}\{{\s*(?P<bottom>{_DECIMAL})\s*\}}"
    rf"|(?P<whole>\d+)\s(?P<part>\d+/\d+)(?![\d/])"
    rf"|(?P<over>{_DECIMAL}\s?/\s?{_DECIMAL})(?![\d/])"
    rf"|(?P<plain>{_DECIMAL}))"
    r"(?P<percent>\s?\\?%)?(?:\s(?P<scale>thousand|million|billion)\b)?",
)
"""A number as people and models write it: `-1,234.50`, `$3`, `3/4`, `1 1/2`, `\\frac{3}{4}`, `50%`, `2 million`."""
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}

_LEAD = r"[\s*_`:\\({\[\"']*"  # markdown and LaTeX that may stand between a marker and the answer
_MACRO = r"\$?(?:\\?(?:boxed|text|textbf|mathrm)\{)*"
_HASHES = re.compile(r"####(?P<rest>[^\n]*)")
_PREAMBLE = re.compile(rf"^{_LEAD}(?:(?:the\s+)?(?:final\s+)?answer(?:\s+is)?{_LEAD})?", re.IGNORECASE)
_ANSWER_IS = re.compile(r"\banswer\b(?:\s+is\b|\s*:|\s*=|\*\*\s*:|:\s*\*\*)(?P<rest>[^\n]*)", re.IGNORECASE)
_HARMLESS = re.compile(
    r"(?=.{1,100}$)(?:[\d.,+\-/(){}\s]|\*(?!\*)|\\(?:sqrt|[dt]?frac|cdot|times|pi|left|right))+", re.DOTALL
)
"""LaTeX that a computer algebra system is done with at once."""


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
    lines = [found for match in _HASHES.finditer(text) if (found := _number_of_line(match["rest"])) is not None]
    if lines:
        # small models repeat the line until they run out of tokens, perhaps in the middle of the number
        repeats = len(lines) > 1 and text.endswith(lines[-1]) and lines[-2].startswith(lines[-1])
        return lines[-2] if repeats else lines[-1]
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
    if values(gold) and values(answer) and not _is_expression(answer):
        return _same_values(gold, answer)
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
    return abs(one - other) <= Fraction(1, 10**6) * max(abs(one), abs(other))


def _number_of_line(line: str) -> str | None:
    """The number that the rest of a `####` line gives."""
    start = _PREAMBLE.match(line)
    assert start is not None  # the pattern matches the empty string
    match = NUMBER.match(line, start.end())
    if "=" in line and not (match and re.match(r"\s*=", line[match.end() :])):  # "5 + 3 = 8", but not "8 = 5 + 3"
        return _first_number(line.rpartition("=")[2])
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
    if not all(_HARMLESS.fullmatch(text) for text in (gold, answer)):
        return False  # a tower of powers or a large factorial would keep sympy busy for hours
    try:
        from math_verify import parse, verify
    except ImportError:
        return False
    # its time limit is a Unix signal, which only the main thread may set
    limit = 2 if threading.current_thread() is threading.main_thread() else None
    one = parse(f"${gold}$", parsing_timeout=limit, raise_on_error=False)
    other = parse(f"${answer}$", parsing_timeout=limit, raise_on_error=False)
    return bool(one and other and verify(one, other, timeout_seconds=limit, raise_on_error=False))


def _after_mark(text: str) -> str | None:
    """What the last "answer:" or "answer is" is followed by, on its line or the next one that is not empty."""
    matches = list(_ANSWER_IS.finditer(text))
    if not matches:
        return None
    rest = re.sub(rf"^{_LEAD}$", "", matches[-1]["rest"]) or text[matches[-1].end() :].strip().partition("\n")[0]
    return rest.strip()


def answer_letter(text: str, letters: str = "ABCD") -> str | None:
    """The letter that a multiple-choice completion settles on; `None` if it is not clear.

    What follows the last "Answer:" or "answer is"; else a letter that the text begins with; else the last "option C";
    else the only letter that stands alone. A bare "A" before a word is taken for the article.
    """
    alone = rf"\(?([{letters}])(?![\w'’])\)?"
    single = rf"(?!\s*(?:,|/|&|or\b|and\b)\s*\(?[{letters}](?![\w'’]))"  # "A or B" settles nothing
    given = _after_mark(text)
    if given is not None:
        match = re.match(rf"{_LEAD}(?:(?:option|choice)\s)?{_LEAD}{_MACRO}{alone}{single}", given, re.IGNORECASE)
        settled = match and (match[1].isupper() or not re.match(r"\s+\w", given[match.end() :]))  # "a number", "i.e."
        return match[1].upper() if match and settled else None
    no_article = r"(?!\s+(?!or\b|and\b)[a-z])" if "A" in letters else ""
    if match := re.match(rf"{_LEAD}{alone}{single}{no_article}", text):
        return match[1]
    named = re.findall(rf"\b(?:[Oo]ption|[Cc]hoice)\s+{_LEAD}{alone}{single}", text)
    standing = named[-1:] or set(re.findall(rf"(?<![\w'’]){alone}{no_article}", text))
    return next(iter(standing)) if len(standing) == 1 else None


def same_choice(gold: str, choices: Sequence[str], text: str) -> bool:
    """Whether a completion picks the right choice: by its letter, or by repeating the choice itself."""
    letters = "".join(chr(65 + index) for index in range(len(choices)))
    said = plain(short_answer(text) or "")
    named = [letter for letter, choice in zip(letters, choices, strict=True) if plain(choice) == said]
    if len(named) == 1 and len(said) > 1:
        return named[0] == gold
    return answer_letter(text, letters) == gold


def short_answer(text: str, *, unmarked: Literal["first", "last"] = "first") -> str | None:
    """A short answer as it is written: after the last "Answer:" or "answer is", else boxed, else the first (or last)
    line."""
    lines = text.strip().split("\n")
    given = _after_mark(text) or last_box(text) or lines[0 if unmarked == "first" else -1]
    given = given.strip().strip("*_`").strip()
    return given or None


def same_short_answer(gold: str, answer: str | None) -> bool:
    """Normalised exact match (BBH): case, outer punctuation and markdown do not count.

    A gold letter `(B)` also matches `B` and `(B) 12/25/1937`; a gold number also one with a unit; a single gold word
    also one that an explanation follows; a list of words also one with commas; brackets also with other spaces.
    """
    if answer is None:
        return False
    if letter := re.fullmatch(r"\(?([A-Z])\)", gold):
        return answer_letter(f"answer: {answer}", "ABCDEFGHIJKLMNOPQRSTUVWXYZ") == letter[1]
    if not re.search(r"\w", gold):
        return re.sub(r"\s", "", gold) == re.sub(r"[\s`*]", "", answer)
    if NUMBER.fullmatch(gold):
        start = NUMBER.match(tidy(answer))
        return start is not None and _same_values(gold, start.group())
    head = re.split(r"[,.;:(\n]|\s[-\u2013\u2014]\s|\b(?:because|since|as)\b", answer)[0]
    candidates = [answer, answer.replace(",", " ")] + ([head] if len(gold.split()) == 1 else [])
    return plain(gold) in [plain(candidate) for candidate in candidates]


def _same_values(gold: str, answer: str) -> bool:
    return any(_close(one, other) for one in values(gold) for other in values(answer))


def plain(text: str) -> str:
    """`text` without case, outer quotes, brackets, markdown and full stop, and with single spaces."""
    text = " ".join(tidy(text).casefold().split())
    return text.strip("*_`\"'“”‘’.,;:!?()[] ")
