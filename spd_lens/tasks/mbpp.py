"""MBPP: short Python problems with asserts (Austin et al. 2021; the paper's code source)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from spd_lens.examples import Example
from spd_lens.tasks.base import Pools, PublishedTask
from spd_lens.tasks.code import CodeTask
from spd_lens.tasks.sources import Row

_FILES = {"full": "mbpp.jsonl", "sanitized": "sanitized-mbpp.json"}
_TEST_IDS = range(11, 511)
"""Task ids that the source keeps for evaluation; 1-10 and 511-974 are for training and prompting."""


@dataclass(kw_only=True)
class MBPP(CodeTask, PublishedTask):
    """974 problems, 427 of them also in a sanitized form.

    The paper trains on 374 + 90 full problems and tests on the 257 sanitized ones of the test ids, and so does
    `version="paper"`.
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

    def _side(self, form: str, testing: bool) -> list[Example]:
        if self.path:
            rows = self.source.file(_FILES[form])
        else:
            splits = ("test",) if testing else ("prompt", "train", "validation")
            rows = [row for split in splits for row in self.source.dataset(form, split)]
        numbered = sorted(((row.integer("task_id"), row) for row in rows), key=lambda pair: pair[0])
        return [self._example(row, form, id) for id, row in numbered if (id in _TEST_IDS) == testing]

    def _example(self, row: Row, form: str, id: int) -> Example:
        if form == "full":
            problem, setup = row.text("text"), row.text("test_setup_code", empty=True)
        else:
            problem, setup = row.text("prompt"), "\n".join(row.texts("test_imports"))
        return self.example(
            f"mbpp-{form}-{id}", problem, row.text("code"), row.texts("test_list"), setup=setup, where=row.where
        )
