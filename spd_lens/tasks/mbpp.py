"""MBPP: short Python problems with asserts (Austin et al. 2021; the paper's code source)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from spd_lens.examples import Example
from spd_lens.tasks.base import Pools
from spd_lens.tasks.code import CodeTask
from spd_lens.tasks.paper import PaperTask
from spd_lens.tasks.sources import Row

_FILES = {"full": "mbpp.jsonl", "sanitized": "sanitized-mbpp.json"}
_IDS = {"test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
"""Task ids of the source's splits; it keeps 1-10 for prompting."""


@dataclass(kw_only=True)
class MBPP(CodeTask, PaperTask):
    """974 problems, 427 of them also in a sanitized form.

    The paper trains on 374 + 90 full problems and tests on the 257 sanitized ones of the test ids, and so does
    `version="paper"`. The training side has the ten problems for prompting too, but in file order (374 + 90).
    """

    name: ClassVar[str] = "mbpp"
    local_form: ClassVar[str] = "mbpp.jsonl (full) and sanitized-mbpp.json"

    hub: str = "google-research-datasets/mbpp"
    max_new_tokens: int = 320
    version: Literal["paper", "full", "sanitized"] = "paper"
    """`full` or `sanitized` for both sides; `paper`: training side full, test side sanitized."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_option("version", ("paper", "full", "sanitized"))

    def load(self) -> Pools:
        train_form = "full" if self.version == "paper" else self.version
        test_form = "sanitized" if self.version == "paper" else self.version
        return Pools(train=self._side(train_form, testing=False), test=self._side(test_form, testing=True))

    def extract(self, text: str) -> str | None:
        return super().extract(self._code_in(text))

    def score(self, item: Example, text: str) -> float:
        return super().score(item, self._code_in(text))

    def _code_in(self, text: str) -> str:
        """The completion without the space that the reference template begins it with, which would indent a line."""
        return text.removeprefix(" ") if self.bare else text

    def _side(self, form: str, testing: bool) -> list[Example]:
        splits = ("test",) if testing else ("train", "validation")
        if self.path:
            rows = self.source.file(_FILES[form])
        else:
            wanted = splits if testing or self.order == "file" else ("prompt", *splits)
            rows = [row for split in wanted for row in self.source.dataset(form, split)]
        numbered = [(row.integer("task_id"), row) for row in rows]
        if self.order == "file":
            of_split = [(id, row) for split in splits for id, row in numbered if id in _IDS[split]]
            return [self._example(row, form, id) for id, row in of_split]
        numbered.sort(key=lambda pair: pair[0])
        return [self._example(row, form, id) for id, row in numbered if (id in _IDS["test"]) == testing]

    def _example(self, row: Row, form: str, id: int) -> Example:
        if form == "full":
            problem, setup = row.text("text"), row.text("test_setup_code", empty=True)
        else:
            problem, setup = row.text("prompt"), "\n".join(row.texts("test_imports"))
        tests = row.texts("test_list")
        made = self.example(f"mbpp-{form}-{id}", problem, row.text("code"), tests, setup=setup, where=row.where)
        return _bare_example(made, problem, tests, row.text("code")) if self.bare else made


def _bare_example(made: Example, problem: str, tests: Sequence[str], code: str) -> Example:
    """A problem in the reference template: the asserts are shown in the prompt, and they are what decides correctness.
    `made` is the same problem as the other template has it."""
    prompt, spans = f"Instruction: {problem}\nYour code should pass these tests:\n", []
    for test in tests:
        spans.append((len(prompt), len(prompt) + len(test)))
        prompt += f"{test}\n"
    meta = {**made.meta, "solution": made.completion}
    return Example(f"{prompt}Code:", f" {code}", (), made.id, meta, prompt_spans=tuple(spans))
