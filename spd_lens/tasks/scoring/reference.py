"""The scores of the paper's reference code (github.com/gh540-svg/hahaha, commit e249fec): plain rules on raw text.

They read the whole completion: thoughts, and what a model goes on to ask itself, count like everything else.
"""

from __future__ import annotations

import re

from spd_lens.tasks.code_names import UNPARSABLE, syntax_tree

TOLERANCE = 1e-4
"""How far apart two numbers that count as equal may be."""
CODE_SECONDS = 5.0
"""How long a program may run against its asserts."""

_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_LETTER = re.compile(r"[ABCD]")
_FENCED = re.compile(r"```[\w+-]*[ \t]*\r?\n(.*?)```", re.DOTALL)
_ENDS = ("\nclass ", "\nif __name__", "\n\n\n")


def last_number(text: str) -> str | None:
    """The last number of a text, commas taken out, with its sign and decimals; `None` if there is none."""
    found = _NUMBER.findall(text.replace(",", ""))
    return found[-1] if found else None


def is_plain_number(text: str) -> bool:
    """Whether a text is one number as `last_number` reads it, and nothing beside it: of `1/2` and `1e-07` it reads a
    part."""
    return _NUMBER.fullmatch(text.strip().replace(",", "")) is not None


def same_number(gold: str, text: str) -> bool:
    """Whether the last numbers of the gold answer and of a completion are the same within `TOLERANCE`."""
    wanted, said = last_number(gold), last_number(text)
    return wanted is not None and said is not None and abs(float(wanted) - float(said)) <= TOLERANCE


def first_letter(text: str) -> str | None:
    """The first of the letters A, B, C and D in a text, be it inside a word; `None` if there is none."""
    match = _LETTER.search(text)
    return match.group() if match else None


def first_line(text: str) -> str | None:
    """The first line of a text that is not blank, without white space around it; `None` if there is none."""
    return text.strip().partition("\n")[0].strip() or None


def same_line(gold: str, text: str) -> bool:
    """Whether the first line of a completion is the gold answer, but for case and white space around it."""
    line = first_line(text)
    return line is not None and line.casefold() == gold.strip().casefold()


def program(text: str) -> str | None:
    """The first fenced block of a text, else the text, cut where a class, a main block or two blank lines begin.

    White space around it is taken off, as every completion begins with a space. `None` if nothing is left.
    """
    fenced = _FENCED.search(text)
    code = (fenced[1] if fenced else text).replace("\r\n", "\n").strip()
    return code[: min([place for end in _ENDS if (place := code.find(end)) >= 0], default=len(code))].rstrip() or None


def parses(text: str) -> bool:
    """Whether a text, without white space around it, parses as Python. An empty one does."""
    try:
        syntax_tree(text.strip())
    except UNPARSABLE:
        return False
    return True
