"""GSM8K: grade-school word problems with worked solutions (Cobbe et al. 2021; the paper's math source)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.tasks.base import Pools
from spd_lens.tasks.forms import FinalNumber
from spd_lens.tasks.paper import PaperTask, bare_example
from spd_lens.tasks.sources import Row


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
            return bare_example(id, prompt, published, begin=begin, answer=answer.strip())
        working = re.sub(r"<<[^<>]*>>", "", solution)  # "48/2 = <<48/2=24>>24": the calculator's mark, then its result
        return self.example(id, row.text("question"), working, answer.strip())
