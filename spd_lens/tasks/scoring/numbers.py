"""The number that a completion ends on."""

from __future__ import annotations

import re

from spd_lens.tasks.scoring.reading import answer_part, boxes, marks, retracted
from spd_lens.tasks.scoring.spelled import SPELLED
from spd_lens.tasks.scoring.values import CURRENCY, DECIMAL, HARMLESS, NUMBER, is_expression, plain_numbers

_MARKUP = (
    r"[\s*_`:({\[<\"'“‘~≈=,]|\\[(\[]|\\(?:boxed|text|textbf|mathrm|mathbf|approx)\b\s?\{?|\$(?=\s?\\?[(\[{a-zA-Z])"
)
_START = re.compile(
    rf"(?:{_MARKUP}|\b(?:the|my|so|thus|hence|therefore|final|correct|right|answer|result|total|sum|value|number|of|is|was"
    r"|are|were|be|equals?|equal\sto|it|that|there|about|approximately|approx\.?|around|roughly|exactly|only|just)\b)*+",
    re.IGNORECASE,
)
"""Markup and words that may stand between a mark and its number."""
_HASHES = re.compile(r"#{4,}(?P<rest>(?:[^#\n]|#(?!###))*)")
_ENUMERATED = re.compile(r"1[.)]\s+\S")
_LINES_READ = 500
_LINE_START = re.compile(r"(?:^|\n)[ \t*]*+\Z")
_HEADING = re.compile(r"[.):]\s*[^\W\d]")
_REMARK = re.compile(
    r"[(\[](?=[^()\[\]\n]*(?:=|[^\W\d_]))|—|\b(?:because|since|where|given|i\.e\.|check(?:ing)?|verif\w{1,8}|note)\b",
    re.IGNORECASE,
)
"""Where a remark on the answer begins."""
_BESIDE = re.compile(r"[,;]\s|\.\s|\s-\s(?=[^\W\d])|\b(?:and|with|plus|as|after|from|so|for|if|when|which|that)\b")
"""Where something else begins, unless the line is a calculation."""
_CALCULATION = re.compile(
    r"[*/×÷^]\s?[\d($\\]|\\(?:times|cdot|div|d?frac)|[\d)$%\w]\s?[-+]\s?[\d($]|\d\s?[xX]\s?\d|%\s?of\s"
    r"|\d\(\d|[^\W\d_]\s(?:x|at|times)\s\$?\d"
)
_SUM = re.compile(rf"{DECIMAL}[^=,;/*]{{0,40}}\sand\s[$]?{DECIMAL}[^=,;/*]{{0,40}}$")
_UNIT = re.compile(r"\s?[^\W\d_]+(?:[\s-][^\W\d_]{2,}){0,3}\s?")
_SENTENCE_END = re.compile(r"[=;\n]|\.\s|,\s|\s\(")
_IN_BRACKETS = re.compile(r"\((?=[^()]*[^\W\d_])[^()]*+\)")
_GROUPS = (re.compile(r"^(\d{1,3}) (\d{3})(?: (\d{3}))?(?![ ]?\d|[.,/]\d)"), r"\1\2\3")
_BEGINNINGS = (
    (re.compile(r"^(?:minus\s|-\s)\s*(?=[\d$.])", re.IGNORECASE), "-"),
    (re.compile(r"^not\b[^,.;\n]{0,60}?\bbut\b\s*"), ""),
    (re.compile(r"^(?:[\d.]+\s?%|\w{1,9})\sof\s\$?\d[\d.,]*(?:\s\w{1,20})?\s(?:is|are|equals)\s(?=\$?\d)"), ""),
    _GROUPS,
)
_UNSETTLED = re.compile(rf"(?:-|~|\s(?:to|or)\s)(?:{CURRENCY})?{DECIMAL}|:\d\d(?!\d)|/\d+/\d+")


def final_number(text: str) -> str | None:
    """The number that a worked solution ends on, as it is written; `None` if there is none.

    After the last `####`; else in the last `\\boxed{}`, unless a "final answer" follows it; else after the last
    "answer is" or "answer:"; else the last number of the text. A `####` line counts only if it gives a number: models
    also write `#### Step 2` as a heading.
    """
    text = plain_numbers(answer_part(text))
    given, end = _given_number(text)
    if given is None:
        return _last_number(text)
    return (_last_number(text[end:]) or given) if retracted(text, end) else given


def _given_number(text: str) -> tuple[str | None, int]:
    """The number that is marked as the answer, and where its mark ends."""
    if lines := hash_lines(text):
        # small models repeat the line until they run out of tokens, perhaps in the middle of the number
        last = [number for number, _ in lines[-2:]]
        repeats = len(lines) > 1 and text.endswith(last[1]) and last[0].startswith(last[1])
        return lines[-2] if repeats else lines[-1]
    named = marks(text)
    for place, box in boxes(text):
        if (found := _number_of_box(box)) is not None:
            later = [mark for mark in named if mark.final and mark.end > place]
            given = ((number, mark.end) for mark in reversed(later) if (number := number_of_line(mark.rest)))
            return next(given, (found, place))
    for read in (number_of_line, _first_number):
        for mark in reversed(named):
            if _ENUMERATED.match(mark.rest):  # "We can find the answer:", and then steps
                continue
            if (found := read(mark.rest)) is not None:
                return found, mark.end
    return None, 0


def hash_lines(text: str, *, line_start: bool = False) -> list[tuple[str, int]]:
    """The numbers that `####` lines give, in order, and where their marks end; with `line_start` only of those with
    nothing before the mark."""
    text = plain_numbers(text)
    found: list[tuple[str, int]] = []
    headings: set[int] = set()
    for match in list(_HASHES.finditer(text))[-_LINES_READ:]:
        rest = match["rest"]
        if not rest.strip("*_`: \t\r") or re.fullmatch(r"\W*(?:final )?answer\W*", rest, re.IGNORECASE):
            rest = text[match.end() : match.end() + 200].strip().partition("\n")[0]
        number = number_of_line(rest)
        if number is not None and _is_heading(rest, number, headings):
            number = next((read for mark in marks(rest) if (read := number_of_line(mark.rest))), None)
        begins = _LINE_START.search(text, max(0, match.start() - 20), match.start())
        if number is not None and (begins or not line_start):
            found.append((number, match.start("rest")))
    return found


def _is_heading(line: str, number: str, headings: set[int]) -> bool:
    """Whether a line is one of a row of headings: `#### 1. Read the problem`, `#### 2. Solve it`."""
    behind = line[line.find(number) + len(number) :]
    if not re.fullmatch(r"\d{1,3}", number) or not _HEADING.match(behind):
        return False
    headings.add(int(number))
    return int(number) == 1 or int(number) - 1 in headings or bool(marks(behind))


def number_of_line(line: str) -> str | None:
    """The number that a line gives after its mark: `72 clips (48 / 2 = 24 in May)`, `6 * 7 = 42`, `x = 12`.

    What is only said about it does not count. `None` where it neither begins with a number nor ends on "= number".
    """
    start = _START.match(line)
    assert start is not None  # the pattern matches the empty string
    line = re.sub(r"(?<!\d)\*\*|\*\*(?!\d)", "", line[start.end() :]).replace("**", "^")
    for pattern, plain in _BEGINNINGS:
        line = pattern.sub(plain, line, count=1)
    match = NUMBER.match(line)
    clause = line[: remark.start()] if (remark := _REMARK.search(line)) else line
    if match is None:
        if "=" in clause and not line.startswith("not "):
            return _first_number(clause.rpartition("=")[2])
        word = SPELLED.match(line)
        return _expression_at(line) or (word.group() if word else None)
    left, equals, right = clause.partition("=")
    if equals and (_CALCULATION.search(_BESIDE.split(left, maxsplit=1)[0]) or _SUM.match(left)):  # "6 * 7 = 42"
        return _result(clause)
    if equals and _UNIT.fullmatch(left, match.end()) and not _BESIDE.search(left):  # "2 hours = 120 minutes"
        found = NUMBER.search(right)
        if found and not re.search(r"\d", right[found.end() :]):
            return found.group().strip()
    return _number_at(line, match)


def _number_at(line: str, match: re.Match[str]) -> str:
    """The number that a line begins with, with what makes it more than that: an expression, a range, a time, a date."""
    if expression := _expression_at(line):
        return expression
    if (unsettled := _UNSETTLED.match(line, match.end())) and unsettled.group() != ":00":
        return match.group() + unsettled.group()
    return match.group().strip()


def _expression_at(line: str) -> str | None:
    """What a line begins with, where that is more than a number, as far as the sentence goes."""
    whole = _SENTENCE_END.split(line, maxsplit=1)[0].strip("*.$ \t\r")
    complete = whole[-1:] in ")}" or whole[-1:].isdigit()
    expression = complete and is_expression(whole) and HARMLESS.fullmatch(whole) and not re.search(r"\d-\d", whole)
    return whole if expression else None


def _result(clause: str) -> str | None:
    """What the last calculation of a line gives: `48 / 2 = 24, 48 + 24 = 72`."""
    pieces = clause.split("=")
    for left, right in reversed(list(zip(pieces, pieces[1:], strict=False))):
        if (_CALCULATION.search(left) or _SUM.match(left)) and (found := _first_number(right)) is not None:
            return found
    return None


def _number_of_box(box: str) -> str | None:
    for _ in range(3):  # `12 apples` for `\text{12 apples}`
        box = re.sub(r"\\(?:text\w{0,2}|math\w{2}|mbox|operatorname)\{([^{}]*)\}", r" \1 ", box)
    content = _GROUPS[0].sub(_GROUPS[1], " ".join(box.split()), count=1)
    if is_expression(content) and HARMLESS.fullmatch(content):
        return content
    return number_of_line(content) or _last_number(content)


def _first_number(text: str) -> str | None:
    if re.match(r"\W*(?:not|never|neither|unknown|unclear)\b", text):
        return None
    match = NUMBER.search(text)
    if match is None:
        return None
    line = text[match.start() :]
    return _number_at(line, NUMBER.match(line) or match)


def _last_number(text: str) -> str | None:
    """The last number of a text, outside of remarks in brackets where there is one; else the last one in words."""
    for part in (_IN_BRACKETS.sub(" ", text), text):
        if numbers := list(NUMBER.finditer(part)):
            return numbers[-1].group().strip()
    sentence = re.split(r"[.!?\n]", text.strip().rstrip(".!?\n "))[-1]
    words = [match.group() for match in SPELLED.finditer(sentence)]
    return next((word for word in reversed(words) if word.lower() not in ("one", "half")), None)
