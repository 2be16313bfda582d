"""MMLU: multiple choice on 57 subjects (Hendrycks et al. 2021; the paper's question-answering source)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.tasks.base import Pools, normalised
from spd_lens.tasks.forms import ChosenLetter
from spd_lens.tasks.paper import PaperTask, bare_example
from spd_lens.tasks.sources import Row

COLUMNS = ("question", "A", "B", "C", "D", "answer")
SUBJECTS = tuple(
    """abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
    econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
    high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
    high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
    human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
    professional_accounting professional_law professional_medicine professional_psychology public_relations
    security_studies sociology us_foreign_policy virology world_religions""".split()
)
_HUB_SPLITS = {"dev": "dev", "val": "validation", "test": "test"}


@dataclass(kw_only=True)
class MMLU(ChosenLetter, PaperTask):
    """Calibration and training from `dev` and `val` (285 + 1,531), test from `test` (14,042).

    In file order both sides are shuffled as the reference code does it, and calibration and training come from
    `auxiliary_train`."""

    name: ClassVar[str] = "mmlu"
    local_form: ClassVar[str] = "dev/, val/ and test/, each with <subject>_<split>.csv"

    hub: str = "cais/mmlu"
    max_new_tokens: int = 24
    subjects: Sequence[str] | None = None
    """Names of subjects; `None`: all 57."""
    train_source: Literal["dev+val", "auxiliary"] | None = None
    """`auxiliary`: train on `auxiliary_train` of the hub (99,842 questions of other exams, without subjects), which has
    the paper's 2,000; calibration stays with dev and val, but in file order. `None`: `auxiliary` in file order, else
    `dev+val`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_source is None:
            self.train_source = "auxiliary" if self.order == "file" else "dev+val"
        self.check_option("train_source", ("dev+val", "auxiliary"))
        self.subjects = self.check_names("subject", self.subjects, SUBJECTS)
        if self.train_source == "auxiliary" and self.path is not None:
            instead = "; or say train_source=dev+val" if self.order == "file" else ""
            raise SPDError(f"mmlu's auxiliary training questions are read from the hub only; leave path away{instead}")

    def load(self) -> Pools:
        if self.order == "file":
            train = self._auxiliary() if self.train_source == "auxiliary" else self._split("dev") + self._split("val")
            return Pools(train=as_datasets_shuffle(train), test=as_datasets_shuffle(self._split("test")))
        own = self._split("dev") + self._split("val")
        if self.train_source == "dev+val":
            return Pools(train=own, test=self._split("test"))
        return Pools(train=self._auxiliary(), test=self._split("test"), calibration=own)

    def _auxiliary(self) -> list[Example]:
        rows = self.source.dataset("all", "auxiliary_train")
        return [self._from_hub(row, f"mmlu-auxiliary-{index}", "") for index, row in enumerate(rows)]

    def problem(self, example: Example) -> str:
        """The question alone: some return with their choices in another order, or with other ones."""
        return normalised(example.meta["question"])

    def _split(self, split: str) -> list[Example]:
        if self.path is None:
            return self._hub_split(split)
        return [
            self._from_file(row, f"mmlu-{split}-{subject}-{index}", subject)
            for subject in self.subjects or ()
            for index, row in enumerate(self.source.file(f"{split}/{subject}_{split}.csv", columns=COLUMNS))
        ]

    def _hub_split(self, split: str) -> list[Example]:
        found: list[Example] = []
        seen = dict.fromkeys(self.subjects or (), 0)
        for row in self.source.dataset("all", _HUB_SPLITS[split]):
            if (subject := row.text("subject")) in seen:
                found.append(self._from_hub(row, f"mmlu-{split}-{subject}-{seen[subject]}", subject))
                seen[subject] += 1
        place = list(seen).index
        return found if self.order == "file" else sorted(found, key=lambda example: place(example.meta["subject"]))

    def _from_file(self, row: Row, id: str, subject: str) -> Example:
        answer = row.text("answer").strip()
        if answer not in ("A", "B", "C", "D"):
            raise SPDError(f"{row.where}: the answer must be A, B, C or D, and is {answer!r}")
        choices = [row.text(letter) for letter in "ABCD"]
        return self._question(id, row.text("question"), choices, "ABCD".index(answer), subject)

    def _from_hub(self, row: Row, id: str, subject: str) -> Example:
        choices, answer = row.texts("choices"), row.integer("answer")
        if len(choices) != 4 or not 0 <= answer < 4:
            raise SPDError(f"{row.where}: needs 4 choices and an answer from 0 to 3, not {len(choices)} and {answer}")
        return self._question(id, row.text("question"), choices, answer, subject)

    def _question(self, id: str, question: str, choices: list[str], answer: int, subject: str) -> Example:
        if self.bare:
            listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", choices, strict=True))
            meta = {"question": question.strip(), "choices": [choice.strip() for choice in choices], "subject": subject}
            letter = "ABCD"[answer]
            return bare_example(id, f"Question: {question}\n{listed}\nAnswer:", letter, answer=letter, **meta)
        intro = f"The following is a multiple choice question about {subject.replace('_', ' ')}.\n\n" if subject else ""
        return self.example(id, question, choices, answer, intro=intro, subject=subject)


def as_datasets_shuffle(items: Sequence[Example], seed: int = 42) -> list[Example]:
    """The items in the order of `datasets.Dataset.shuffle(seed)`, which permutes by numpy's default generator."""
    return [items[place] for place in np.random.default_rng(seed).permutation(len(items))]
