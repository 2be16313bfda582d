"""A completion up to the end of its first answer, and whether it runs on into another one."""

from __future__ import annotations

import re

from spd_lens.tasks import CodeTask, Task, answer_part, runs_on, without_thoughts

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^`~\n]*$", re.MULTILINE)
_DEFINES = re.compile(r"^[ \t]*(?:async[ \t]+def|def|class)[ \t]+\w", re.MULTILINE)
_CODE = re.compile(
    r"\s|[@#)\]}]|[\"']{3}|(?:async|def|class|import|from|if|elif|else|for|while|try|except|finally|with|return|assert"
    r"|print|global|del|pass|raise|yield)\b|[A-Za-z_][\w.]*(?:\[[^\]\n]*\])?[ \t]*(?:[-+*/%|&]?=(?!=)|\()"
)
"""What a line of a program begins with; words of a sentence followed by a bracket look like it, and stay."""
_ASKS = re.compile(
    r"(?:#{1,6}[ \t]*|[*_>]{1,3}[ \t]*)?(?:(?:new|next|another)[ \t])?"
    r"(?:question|problem|exercise|task|instruction|prompt|human|user|q)s?(?:[*_ \t]{0,4}[:：]|[ \t]#?\d{1,4}[:.)])",
    re.IGNORECASE,
)
"""How a line that asks for another program begins; such a line may look like a comment."""


def is_code(task: Task) -> bool:
    """Whether a task's answers are programs."""
    return isinstance(task, CodeTask) or task.name == "codealpaca"


def first_answer(task: Task, text: str) -> str:
    """`text` without thoughts, up to the first question that is asked after an answer was given.

    Of a program's text: up to the end of the first fenced block that defines something; without a fence, up to the
    first line behind a definition that is not code, or asks for something else; where nothing is defined, up to the
    first line that does.
    """
    return first_program(text) if is_code(task) else answer_part(text)


def goes_on(task: Task, text: str) -> bool:
    """Whether a new question, or another speaker's turn, follows the answer."""
    if not is_code(task):
        return runs_on(text)
    rest = without_thoughts(text)[len(first_program(text)) :]
    return runs_on(f"0\n{rest}")  # the program is an answer, and what could be read as a label in it is not seen


def first_program(text: str) -> str:
    """A completion without thoughts, up to the end of its first program; the whole of it where no end is seen."""
    text = without_thoughts(text)
    defined = _DEFINES.search(text)
    if (asked := _next_request(text, defined.start() if defined else None)) is not None:
        return text[:asked]
    if defined is None:
        return text
    fences = list(_FENCE.finditer(text))
    for opened, closed in zip(fences[::2], fences[1::2], strict=False):
        if defined.start() < opened.start():
            break
        if defined.start() < closed.start():
            return text[: closed.end()]
    position = defined.start()
    for line in text[position:].split("\n"):
        if line.strip() and (_ASKS.match(line) or _FENCE.match(line) or not _CODE.match(line)):
            return text[:position]
        position += len(line) + 1
    return text


def _next_request(text: str, end: int | None) -> int | None:
    """Where the first line begins that asks for something else, behind a program that defines nothing; None for none.

    Only lines before `end`, where a definition begins, count; in a text without one, all lines, and whatever stands
    before such a line is a program.
    """
    position, fenced, said = 0, False, False
    for line in text[:end].split("\n"):
        if _FENCE.match(line):
            fenced = not fenced
        elif said and not fenced and _ASKS.match(line):
            return position
        elif words := line.strip():
            said = said or bool(_CODE.match(words) if end is not None else not _ASKS.match(words))
        position += len(line) + 1
    return None
