"""What of a completion is its answer: thoughts and run-on questions left out, and the places that are marked.

Every pattern takes time that grows with the length of the text and no faster, whatever the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from spd_lens.tasks.thoughts import without_thoughts

_ANSWER_TAG = re.compile(r"<answer>(?P<inside>.*?)(?:</answer>|\Z)", re.IGNORECASE | re.DOTALL)
_HEADER = re.compile(
    r"\s*(?:<\|im_start\|>assistant|<\|start_header_id\|>assistant<\|end_header_id\|>|<\|start\|>assistant|<\|message\|>"
    r"|<\|assistant\|>|<start_of_turn>model|\[/INST\])\s*"
)
_TURN = re.compile(
    r"<\|(?:im_start|im_end|start|end|return|eot_id|eom_id|endoftext|end_of_text|start_header_id|user|system)\|>|</s>|<eos>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]|<｜(?:User|end▁of▁sentence)｜>|^[ \t]*(?:user|human)[ \t]*$",
    re.MULTILINE | re.IGNORECASE,
)
"""Marks that end the model's turn or begin another speaker's."""
_KIND = (
    r"(?:question|problem|exercise|example|puzzle|task|scenario|context|passage|prompt|query|instruction|input"
    r"|user|human|q)"
)
_LEAD_IN = (
    r"(?:\d{1,3}[.)][ \t])?(?:now,?[ \t])?(?:here(?:'s|[ \t]is)[ \t])?(?:(?:an?|the)[ \t])?"
    r"(?:(?:new|next|another|similar|follow-?up|bonus|extra|sample|practice|word|math)[ \t]){0,2}"
)
_REQUEST = (
    r"^.*\ba line that says '(?:Answer: |#### )' followed by\b.*$"
    r"|^.*\bone line that says '(?:Answer: |#### )' followed by\b.*$"
    r"|^The following is a multiple choice question about .*$"
)
_FIXED = re.compile(_REQUEST, re.MULTILINE)
"""Lines of the tasks' own prompts, which models repeat."""
_LABEL = re.compile(
    rf"^[ \t>*_#\[<(-]{{0,12}}{_LEAD_IN}{_KIND}(?:[*_ \t]{{0,4}}[:：\]>]|(?<=q)[.)][ \t]"
    rf"|[ \t]?(?:#|no\.?|number)?[ \t]?\d{{1,4}}[*_ \t]{{0,4}}(?:[:：.)\]-]|$))"
    rf"|^[ \t]{{0,3}}#{{1,6}}[ \t]{{0,3}}{_LEAD_IN}{_KIND}[ \t]{{0,3}}$|{_REQUEST}",
    re.MULTILINE | re.IGNORECASE,
)
"""The line that a question begins with."""
_INTRODUCTION = re.compile(
    r"\W*(?:sure|okay|ok|certainly|of course|let|here|first|to (?:solve|answer|find|determine)|we|given|step"
    r"|i(?:'ll| will)?|the (?:question|problem))\b",
    re.IGNORECASE,
)
"""How a text begins that has not come to its answer yet."""
_SECOND_THOUGHT = re.compile(
    r"\W*(?:wait|hm+|but|actually|let|however|no|oh|hold|okay|ok|so|right|check|really|why|what if|what about"
    r"|(?:is|are|was|were|does|did|do|have|has|should|can|could|would|will)\s(?:this|that|it|i|we|you|my|our|there|the"
    r"\s(?:answer|result|total|number|solution))\b)\b",
    re.IGNORECASE,
)
"""How a model begins to question its own answer, which is no new question."""
_WRONG = (
    r"(?:wrong|incorrect|not\s(?:right|correct|quite)|mistake|error|forg[oe]t|misread|should\sbe|should\shave|need\sto|no\b|redo"
    r"|recalculate|instead|actually\sis|is\sactually)"
)
_RETRACTION = re.compile(
    r"(?:[^.!?\n]|\.(?=\d)){0,80}?(?:,?\s(?:but|however,?)\s(?:we|i)\s(?:also\s|still\s)?(?:need|must|have\sto|forgot|should)\b"
    rf"|(?:[.!?\n]+\s*|\s)(?:but\s)?(?:wait|hm+|no|oops|sorry|correction|actually|hold\son|scratch\sthat)\b[^\n]{{0,80}}?\b{_WRONG}"
    r"|[.!?\n]+\s*(?:that|this|it)(?:['’]s|\sis|\swas)\s(?:\w{1,10}\s)?(?:wrong|incorrect|not\s(?:right|correct)|a\smistake))",
    re.IGNORECASE,
)
_TOLD_TO = re.compile(
    r"(?:^|[.!?]\s)(?:find|calculate|compute|determine|solve|evaluate|choose|select|name)\s", re.IGNORECASE
)
"""How a question is put without a question mark."""
_CHOICE_LINE = re.compile(r"\s*\(?(?P<letter>[A-Z])[.):]\s")

_LINK = (
    r"(?:[ \t](?:to|for)[ \t](?:the|this|your)[ \t](?:\w{1,20}[ \t])?(?:question|problem|exercise|puzzle)\b)?"
    r"[*_`\"' \t]{0,6}"
    r"(?:(?:\b(?:is|was|equals|(?:would|should|must|will|has to)[ \t]be)\b|[:：=→⇒]|[-=]>)[ \t]{0,3}){1,2}"
)
_ANSWER = re.compile(r"\banswers?", re.IGNORECASE)
_BEFORE = re.compile(
    r"(?P<open>[*_`'\"“‘«(\[<{]{0,4})(?:\b(?:the|my|our)[ \t]{1,3})?(?P<final>\bfinal[ \t]{1,3})?"
    r"(?:\b(?:correct|right|best)[ \t]{1,3})?\Z",
    re.IGNORECASE,
)
_AFTER = re.compile(_LINK, re.IGNORECASE)
_ALONE = re.compile(
    r"[ \t#*_>]{0,8}(?:the[ \t])?(?P<final>final[ \t])?(?:correct[ \t])?answer[*_ \t#]{0,6}$", re.I | re.M
)
_NO_HEADING = (
    r"(?!(?:step|part|question|problem|exercise|example|solution|approach|explanation|given|calculation|understanding"
    r"|instruction|input|user)\b|\d++[.):][ \t]*[^\W\d])"
)
_HASHED = re.compile(rf"(?<!#)#{{4,}}+[ \t*]{{0,9}}{_NO_HEADING}[^\s#*'\"]", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)[ \t]*\{")
_BARE_BOX = re.compile(r"\\boxed[ \t]+([^\s{}$.,]+)")
_BOXED = re.compile(r"\\(?:boxed|fbox)[ \t]{0,3}\{\s{0,3}[^}\s]")
_ANSWER_LINE = re.compile(
    r"^[ \t*]{0,6}(?:final )?answer[*_]{0,3}:[*_ \t]{0,6}[^\s*_].*$", re.MULTILINE | re.IGNORECASE
)
_CLOSING = str.maketrans("([{<“‘«", ")]}>”’»")
_BLANK = " \t\r\n*_`\"':#"
_MARKS_READ = 50  # The last ones of a text are read: a model that repeats itself may write thousands.


class Mark(NamedTuple):
    """A place that is named as the answer."""

    rest: str
    """What follows on the same line, or the next line that is not empty, without quotes around the whole."""
    end: int
    """Where the mark itself ends in the text."""
    first: bool
    """Whether no other mark stands before it on its line."""
    final: bool
    """Whether it says that the answer is final."""


def answer_part(text: str) -> str:
    """The part of a completion in which its answer stands: without thoughts, and without what follows as a new
    question."""
    text = without_thoughts(text)
    text = text[header.end() :] if (header := _HEADER.match(text)) else text
    inside = [match["inside"] for match in _ANSWER_TAG.finditer(text) if match["inside"].strip()]
    return before_next_question(inside[-1] if inside else text)


def before_next_question(text: str) -> str:
    """`text` up to the first question that is asked after an answer was given (see `next_question`)."""
    return _FIXED.sub("", text[: next_question(text)])


def next_question(text: str) -> int:
    """Where the first question that is asked after an answer was given begins; the length of `text` if none is.

    A question before any answer is the model's restating of its task. Without a label ("Question:", "User:", ...), only
    what follows a line `#### ...` or `Answer: ...` is taken for a new question, and no second thought ("Wait, is it?").
    A mark that ends the model's turn counts as one.
    """
    beginning = len(text) - len(text.lstrip())
    if turn := _TURN.search(text, beginning + 1):
        text = text[: turn.start()]
    return min(_labelled(text, beginning), _unlabelled(text))


def runs_on(text: str) -> bool:
    """Whether a completion goes on with a new question, or another turn, behind its answer."""
    text = without_thoughts(text).rstrip()
    return next_question(text) < len(text)


def _labelled(text: str, beginning: int) -> int:
    """Where the first labelled question after an answer begins."""
    never = len(text) + 1
    hashed = match.end() if (match := _HASHED.search(text)) else never
    boxed = match.end() if (match := _BOXED.search(text)) else never
    given = min([boxed, *(mark.end for mark in marks(text, first=1))])
    restated = False
    for label in _LABEL.finditer(text):
        if label.start() <= beginning:
            restated = True
        elif restated:  # also its parts may be asked as questions, so that only the mark that was asked for ends it
            if (given if hashed == never else hashed) <= label.start():
                return label.start()
        elif min(given, hashed) <= label.start() or _says_something(text[: label.start()]):
            return label.start()
        else:
            restated = True
    return len(text)


def _says_something(text: str) -> bool:
    return not text.rstrip().endswith(":") and (re.search(r"\d", text) is not None or not introduces(text))


def introduces(text: str) -> bool:
    """Whether `text` only leads up to an answer: "Let's think step by step.", "Here it is:"."""
    return text.rstrip().endswith(":") or _INTRODUCTION.match(text) is not None


def _unlabelled(text: str) -> int:
    """Where a question without a label begins, after a line that gives an answer in the form that was asked for."""
    given = [match.end() for match in (_HASHED.search(text), _ANSWER_LINE.search(text)) if match]
    if not given:
        return len(text)
    position, before = min(given), ""
    lines = text[position:].split("\n")
    for number, line in enumerate(lines):
        question = line.rstrip(" \t*_\"')").endswith("?") or (not lines[number - 1].strip() and _TOLD_TO.search(line))
        question = question and len(line.split()) > 3 and not (_SECOND_THOUGHT.match(line) or _LABEL.match(line))
        if question or (not before.endswith(":") and _begins_choices(lines[number : number + 3])):
            return position
        position += len(line) + 1
        before = line.strip() or before
    return len(text)


def _begins_choices(lines: list[str]) -> bool:
    found = [_CHOICE_LINE.match(line) for line in lines if line.strip()]
    return [match["letter"] for match in found[:2] if match] == ["A", "B"]


def without_choices(text: str) -> str:
    """`text` without the list of choices that it begins with, where it repeats them before it says anything."""
    lines = text.strip().split("\n")
    if not _begins_choices(lines[:3]):
        return text
    expected = "A"
    for number, line in enumerate(lines):
        match = _CHOICE_LINE.match(line)
        if line.strip() and (match is None or match["letter"] < expected):
            return "\n".join(lines[number:])
        expected = chr(ord(match["letter"]) + 1) if match else expected
    return ""


def retracted(text: str, end: int) -> bool:
    """Whether a model takes back what it said before `end`: "The answer is 41, but we need to add ...", "Wait, no"."""
    line_end = text.find("\n", end)
    return any(_RETRACTION.match(text, place, place + 300) for place in (end, line_end) if place >= 0)


def marks(text: str, *, first: int | None = None) -> list[Mark]:
    """What is named as the answer ("Answer: ...", "the answer is ..."), in the order of the text: the last ones, or the
    `first`."""
    found: list[Mark] = []
    before: int | None = None
    words = _ANSWER.finditer(text)
    for word in words if first else list(words)[-_MARKS_READ:]:
        line = text.rfind("\n", 0, word.start())
        named = _BEFORE.search(text, max(0, word.start() - 40), word.start())
        if (linked := _AFTER.match(text, word.end())) and named:
            end, final, closing = linked.end(), named["final"], named["open"].translate(_CLOSING)[::-1]
        elif alone := _ALONE.match(text, line + 1):
            end, final, closing = alone.end(), alone["final"], ""
        else:
            continue
        if rest := _rest(text, end, closing):
            found.append(Mark(rest, end, line != before, bool(final)))
            before = line
        if first and len(found) == first:
            break
    return found


def _rest(text: str, place: int, closing: str) -> str:
    end = text.find("\n", place)
    rest = text[place : end if end >= 0 else len(text)]
    if not rest.strip(_BLANK):
        start = place + len(rest)
        return next((line.strip() for line in text[start : start + 2000].split("\n") if line.strip(_BLANK)), "")
    rest = _unquoted(rest.strip(), closing)
    if rest.startswith("followed by the "):  # the prompt's own words
        return ""
    return rest[2:].strip() if rest.startswith("**") and rest.count("**") % 2 else rest


def _unquoted(rest: str, closing: str) -> str:
    """What follows a mark that stands inside quotes or bold type: `'Answer: B'`, `**Answer:** B`."""
    if not closing or closing not in rest:
        return rest
    if rest.startswith(closing):
        return rest[len(closing) :].strip()
    place = rest.find(closing) if closing[0] in "*_`" else rest.rfind(closing)
    return rest[:place].strip()


def boxes(text: str) -> Iterator[tuple[int, str]]:
    """What stands in each `\\boxed{...}`, with braces matched, and where it ends; the last one first."""
    end = len(text)
    for _ in range(_MARKS_READ):
        start = max(text.rfind("\\boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            return
        end = start
        opened = _BOX.match(text, start)
        if opened is None:
            if bare := _BARE_BOX.match(text, start):
                yield bare.end(), bare[1]
            continue
        depth, position = 1, opened.end()
        while position < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            position += 1
        content = text[opened.end() : position - (depth == 0)].strip()
        if content:
            yield position, content


def tidy(text: str) -> str:
    """`text` with the typographic variants of minus, slash and comma that models produce made plain."""
    return text.translate(_PLAIN)


_PLAIN = str.maketrans({"\u2212": "-", "\u2013": "-", "\u2044": "/", "\uff0c": ",", "\u066b": ".", "\u066c": ","})
