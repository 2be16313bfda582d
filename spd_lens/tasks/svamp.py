"""SVAMP: short word problems that vary existing ones (Patel et al. 2021; the paper's second math benchmark)."""

from __future__ import annotations

import ast
import math
import operator
import re
from dataclasses import dataclass
from typing import ClassVar

from spd_lens.examples import Example
from spd_lens.tasks.base import Pools, split_off
from spd_lens.tasks.forms import FinalNumber
from spd_lens.tasks.paper import PaperTask, bare_example
from spd_lens.tasks.sources import Row

_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_HUB_SPLITS = ("train", "test")
_TOKENS = re.compile(r"\d+(?:\.\d+)?|[-+*/()]")


@dataclass(kw_only=True)
class SVAMP(FinalNumber, PaperTask):
    """1,000 problems. Completion: the source's equation as one line, then `#### N`; in the template `reference` the
    published number alone (`51.0`).

    The source has no split, and that of the hub's copy (700 / 300) is not the authors': both are read whole and divided
    here, always in the same way, into a training side of 700 and a test side of 300. In file order the hub's copy keeps
    its split.
    """

    name: ClassVar[str] = "svamp"
    local_form: ClassVar[str] = "SVAMP.json"

    hub: str = "ChilleD/SVAMP"
    max_new_tokens: int = 200

    def load(self) -> Pools:
        if self.order == "file" and not self.path:
            return Pools(*([self._example(row) for row in self.source.dataset(None, side)] for side in _HUB_SPLITS))
        if self.path:
            rows = self.source.file("SVAMP.json")
        else:
            rows = [row for side in _HUB_SPLITS for row in self.source.dataset(None, side)]
        examples = [self._example(row) for row in rows]
        if self.order == "seeded":
            examples.sort(key=lambda example: (len(example.id), example.id))  # chal-2 before chal-10; the hub shuffles
        return Pools(*split_off(examples, "svamp", n_test=round(0.3 * len(examples))))

    def _example(self, row: Row) -> Example:
        if self.bare:
            return self._bare_example(row)
        body, question = row.text("Body").strip(), row.text("Question").strip()
        # many bodies lack their full stop: "... at the start" + "How much did ..."
        problem = f"{body}{'' if body[-1] in '.,!?;:' else '.'} {question}"
        value = row.number("Answer")
        working = worked_line(row.text("Equation"), value)
        answer, type = plain_number(value), row.data.get("Type")
        results = [(len(working) - len(answer), len(working))] if working else []
        return self.example(f"svamp-{row.text('ID')}", problem, working, answer, results=results, type=type)

    def _bare_example(self, row: Row) -> Example:
        row.number("Answer")  # refuses what is none
        prompt, answer = f"Question: {row.text('Body')} {row.text('Question')}\nAnswer:", str(row.data["Answer"])
        meta = {"answer": answer.strip(), "type": row.data.get("Type")}
        return self.marked(bare_example(f"svamp-{row.text('ID')}", prompt, answer, meta, begin=1), [])


def worked_line(equation: str, answer: float) -> str:
    """`( ( 8.0 - 3.0 ) * 2.0 )` and 10 become `(8 - 3) * 2 = 10`.

    Empty where the equation gives another number than the answer (one record of the source, chal-680), has no
    operation in it, or is not arithmetic: no wrong working then, only the answer.
    """
    tokens = _TOKENS.findall(equation)
    if "".join(tokens) != re.sub(r"\s", "", equation) or len(tokens) > 50:
        return ""
    if not math.isclose(_value(" ".join(tokens)), answer, abs_tol=1e-6) or len(tokens) < 3:
        return ""
    text = " ".join(plain_number(float(token)) if token[0].isdigit() else token for token in tokens)
    text = re.sub(r"\(\s", "(", re.sub(r"\s\)", ")", text))
    if text[0] == "(" and not math.isnan(_value(text[1:-1])):  # the outermost pair says nothing
        text = text[1:-1]
    return f"{text} = {plain_number(answer)}"


def plain_number(value: float) -> str:
    """A number as one writes it: `51` for 51.0, `0.5` for 0.5."""
    return str(int(value)) if value == int(value) else f"{value:.10g}"


def _value(expression: str) -> float:
    """The value of arithmetic in `+ - * /` and brackets, NaN of anything else; data is never given to `eval`."""

    def value(node: ast.expr) -> float:
        match node:
            case ast.Constant(float(number)):
                return number
            case ast.BinOp(left, operation, right) if type(operation) in _OPERATIONS:
                return _OPERATIONS[type(operation)](value(left), value(right))
        return math.nan

    # as decimals, since Python takes no whole number with a leading zero
    numbers = re.sub(r"[\d.]+", lambda number: repr(float(number[0])), expression)
    try:
        return value(ast.parse(numbers, mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return math.nan
