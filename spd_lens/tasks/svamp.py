"""SVAMP: short word problems that vary existing ones (Patel et al. 2021; the paper's second math benchmark)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from spd_lens.examples import Example
from spd_lens.tasks.base import Pools, PublishedTask, split_off
from spd_lens.tasks.forms import FinalNumber
from spd_lens.tasks.sources import Row

_TOKENS = re.compile(r"\d+(?:\.\d+)?|[-+*/()]")


@dataclass(kw_only=True)
class SVAMP(FinalNumber, PublishedTask):
    """1,000 problems. Completion: the source's equation as one line, then `#### N`.

    The source has no split, and the hub's copy (700 / 300) is somebody else's: both are read whole and divided here,
    always in the same way, into a training side of 700 and a test side of 300.
    """

    name: ClassVar[str] = "svamp"
    local_form: ClassVar[str] = "SVAMP.json"

    hub: str = "ChilleD/SVAMP"
    max_new_tokens: int = 200

    def load(self) -> Pools:
        if self.path:
            rows = self.source.file("SVAMP.json")
        else:
            rows = self.source.dataset(None, "train") + self.source.dataset(None, "test")
        examples = [self._example(row) for row in rows]
        examples.sort(key=lambda example: (len(example.id), example.id))  # chal-2 before chal-10; the hub shuffles
        return Pools(*split_off(examples, "svamp", n_test=round(0.3 * len(examples))))

    def _example(self, row: Row) -> Example:
        body, question = row.text("Body").strip(), row.text("Question").strip()
        # many bodies lack their full stop: "... at the start" + "How much did ..."
        problem = f"{body}{'' if body[-1] in '.,!?;:' else '.'} {question}"
        value = row.number("Answer")
        working = worked_line(row.text("Equation"), value)
        return self.example(f"svamp-{row.text('ID')}", problem, working, plain_number(value), type=row.data.get("Type"))


def worked_line(equation: str, answer: float) -> str:
    """`( ( 8.0 - 3.0 ) * 2.0 )` and 10 become `(8 - 3) * 2 = 10`.

    Empty where the equation gives another number than the answer (one record of the source, chal-680), has no
    operation in it, or is not arithmetic: no wrong working then, only the answer.
    """
    tokens = _TOKENS.findall(equation)
    if "".join(tokens) != re.sub(r"\s", "", equation) or len(tokens) > 50:
        return ""
    parser = _Parser(tokens)
    value = parser.sum()
    if parser.position != len(tokens) or not math.isclose(value, answer, abs_tol=1e-6) or len(tokens) < 3:
        return ""
    text = " ".join(plain_number(float(token)) if token[0].isdigit() else token for token in tokens)
    text = re.sub(r"\(\s", "(", re.sub(r"\s\)", ")", text))
    if text.startswith("(") and _closes_at(text) == len(text) - 1:  # the outermost pair says nothing
        text = text[1:-1]
    return f"{text} = {plain_number(answer)}"


def plain_number(value: float) -> str:
    """A number as one writes it: `51` for 51.0, `0.5` for 0.5."""
    return str(int(value)) if value == int(value) else f"{value:.10g}"


def _closes_at(text: str) -> int:
    """Where the bracket that `text` begins with is closed."""
    depth = 0
    for position, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return position
    return -1


class _Parser:
    """Arithmetic by recursive descent: equations are data, and data is never given to `eval`. NaN means malformed."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0

    def sum(self) -> float:
        value = self._product()
        while (sign := self._take("+-")) is not None:
            other = self._product()
            value = value + other if sign == "+" else value - other
        return value

    def _product(self) -> float:
        value = self._atom()
        while (sign := self._take("*/")) is not None:
            other = self._atom()
            if sign == "/" and other == 0:
                return math.nan
            value = value * other if sign == "*" else value / other
        return value

    def _atom(self) -> float:
        if self._take("(") is not None:
            value = self.sum()
            return value if self._take(")") is not None else math.nan
        if self.position < len(self.tokens) and self.tokens[self.position][0].isdigit():
            self.position += 1
            return float(self.tokens[self.position - 1])
        return math.nan

    def _take(self, allowed: str) -> str | None:
        if self.position < len(self.tokens) and self.tokens[self.position] in allowed:
            self.position += 1
            return self.tokens[self.position - 1]
        return None
