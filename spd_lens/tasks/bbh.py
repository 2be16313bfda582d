"""BBH: 27 hard tasks of BIG-Bench (Suzgun et al. 2022; the paper's second question-answering benchmark)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from spd_lens.examples import Example
from spd_lens.tasks.base import Pools, split_off
from spd_lens.tasks.forms import ANSWER_MARK, AnswerLine, answer_example
from spd_lens.tasks.paper import PaperTask, bare_example
from spd_lens.tasks.scoring import reference
from spd_lens.tasks.scoring.letters import same_choice
from spd_lens.tasks.scoring.short_answers import same_short_answer
from spd_lens.tasks.scoring.words import short_answer
from spd_lens.tasks.sources import Row

SUBTASKS = tuple(
    """boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies
    geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects
    logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting
    penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
    sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
    tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting""".split()
)
DEFAULT_SUBTASKS = tuple(
    """boolean_expressions date_understanding logical_deduction_three_objects navigate object_counting
    sports_understanding""".split()
)
"""The paper says 6 subtasks and not which. These differ in skill (logic, dates, deduction, space, counting, facts) and
in the form of the answer (True/False, letter, Yes/No, number), and their prompts are short."""
REFERENCE_SUBTASKS = tuple(
    """logical_deduction_three_objects date_understanding movie_recommendation boolean_expressions causal_judgement
    sports_understanding""".split()
)
"""The six of the reference code (github.com/gh540-svg/hahaha, commit e249fec), in its order."""
REQUEST = f"Reply with one line that says '{ANSWER_MARK}' followed by the answer."

_FIRST = 50
"""How many of each subtask are for testing in file order."""
_OPTION = re.compile(r"^(\([A-Z]\)) (.*\S)", re.MULTILINE)


@dataclass(kw_only=True)
class BBH(AnswerLine, PaperTask):
    """250 examples (some fewer) per subtask. The source has no split: 60 % of each subtask, always the same, are for
    testing. Draws take from the subtasks in turn. In file order the first 50 of each are for testing, subtask after
    subtask as they were given. The authors ask that the files stay out of training corpora; the
    paper only evaluates on them."""

    name: ClassVar[str] = "bbh"
    group: ClassVar[str | None] = "subtask"
    local_form: ClassVar[str] = "one <subtask>.json per subtask"

    hub: str = "lukaemon/bbh"
    max_new_tokens: int = 48
    subtasks: Sequence[str] | None = DEFAULT_SUBTASKS
    """Names of subtasks; `None`: all 27."""
    span: Literal["answer", "line"] = "answer"
    """What decides correctness: what follows `Answer: `, or the whole line."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_option("span", ("answer", "line"))
        given = self.subtasks
        self.subtasks = self.check_names("subtask", given, SUBTASKS)
        if self.order == "file" and isinstance(given, list | tuple):
            self.subtasks = tuple(dict.fromkeys(given))

    def load(self) -> Pools:
        train: list[Example] = []
        test: list[Example] = []
        for subtask in self.subtasks or ():
            if self.path:
                rows = self.source.file(f"{subtask}.json", key="examples")
            else:
                rows = self.source.dataset(subtask, "test")
            examples = [self._example(row, subtask, index) for index, row in enumerate(rows)]
            if self.order == "file":
                sides = examples[_FIRST:], examples[:_FIRST]
            else:
                sides = split_off(examples, f"bbh|{subtask}", n_test=round(0.6 * len(examples)))
            train += sides[0]
            test += sides[1]
        return Pools(train, test)

    def _example(self, row: Row, subtask: str, index: int) -> Example:
        id = f"bbh-{subtask}-{index}"
        if self.bare:
            target, meta = row.text("target"), {"subtask": subtask, "answer": row.text("target").strip()}
            return bare_example(id, f"{row.text('input')}\nAnswer:", target, meta)
        return answer_example(
            id,
            f"{row.text('input').strip()}\n\n{REQUEST}",
            row.text("target").strip(),
            whole_line=self.span == "line",
            meta={"subtask": subtask},
        )

    def check_scorable(self) -> None:
        if self.scoring == "reference":
            self.check_gold(lambda answer: reference.same_line(answer, answer), "one line")

    def extract(self, text: str) -> str | None:
        return reference.first_line(text) if self.scoring == "reference" else short_answer(text)

    def score(self, item: Example, text: str) -> float:
        gold = item.meta["answer"]
        if self.scoring == "reference":
            return float(reference.same_line(gold, text))
        listed = _OPTION.findall(item.prompt)
        if gold in [letter for letter, _ in listed]:
            return float(same_choice(gold.strip("()"), [choice for _, choice in listed], text))
        return float(same_short_answer(gold, text))
