"""GSM8K: grade-school word problems with worked solutions (Cobbe et al. 2021; the paper's math source)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from spd_lens.errors import SPDError
from spd_lens.examples import Example, Span
from spd_lens.tasks.base import Pools
from spd_lens.tasks.forms import FinalNumber
from spd_lens.tasks.marks import NUMBER
from spd_lens.tasks.paper import PaperTask, bare_example
from spd_lens.tasks.sources import Row

_MARK = re.compile(r"<<[^<>]*?([^<>=]*)>>")
"""A calculator's mark, `<<48/2=24>>`, with its result."""
_WRITTEN = re.compile(rf"-?\$?({NUMBER.pattern})")


@dataclass(kw_only=True)
class GSM8K(FinalNumber, PaperTask):
    """7,473 training and 1,319 test problems. Completion: the gold solution, without calculator marks in the template
    `instruct` and as published in `reference`."""

    name: ClassVar[str] = "gsm8k"
    local_form: ClassVar[str] = "train.jsonl and test.jsonl"

    hub: str = "openai/gsm8k"
    max_new_tokens: int = 320

    def load(self) -> Pools:
        return Pools(train=self._side("train"), test=self._side("test"))

    def _side(self, split: str) -> list[Example]:
        rows = self.source.file(f"{split}.jsonl") if self.path else self.source.dataset("main", split)
        return [self._example(row, f"gsm8k-{split}-{index}") for index, row in enumerate(rows)]

    def _example(self, row: Row, id: str) -> Example:
        solution, mark, answer = row.text("answer").rpartition("####")
        if not mark or not answer.strip():
            raise SPDError(f"{row.where}: the field 'answer' does not end with '#### ' and a number")
        if self.bare:
            published, prompt = row.text("answer"), f"Question: {row.text('question')}\nAnswer:"
            begin = 1 + len(published) - len(answer.removeprefix(" "))
            made = bare_example(id, prompt, published, {"answer": answer.strip()}, begin=begin)
            ends = [(mark.end(1), mark[1].lstrip("-")) for mark in _MARK.finditer(made.completion)]
            return self.marked(made, [(end - len(value), end) for end, value in ends if NUMBER.fullmatch(value)])
        working, results = without_marks(solution)
        return self.example(id, row.text("question"), working, answer.strip(), results=results)


def without_marks(solution: str) -> tuple[str, list[Span]]:
    """A solution without the calculator's marks, and where in it a number stands that followed one: `48/2 =
    <<48/2=24>>24` becomes `48/2 = 24`, with the place of the `24`."""
    working, results, end = "", list[Span](), 0
    for mark in _MARK.finditer(solution):
        working, end = working + solution[end : mark.start()], mark.end()
        if number := _WRITTEN.match(solution, end):
            results.append((len(working) + number.start(1) - end, len(working) + number.end(1) - end))
    return working + solution[end:], results
