"""The answer forms that several tasks share: where the correctness span lies and how an answer is scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spd_lens.errors import SPDError
from spd_lens.examples import Example, Span
from spd_lens.tasks.base import Task
from spd_lens.tasks.scoring import final_number, same_number

NUMBER_REQUEST = "Solve the problem step by step. End with a line that says '#### ' followed by the final number."


@dataclass(kw_only=True)
class FinalNumber(Task):
    """Worked solutions that end on `#### N` (paper table 6: the span is the final numeric answer, 1-3 tokens)."""

    span: Literal["number", "line", "completion"] = "number"
    """What decides correctness: the number alone (the paper), the whole `#### N` line, or everything."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_option("span", ("number", "line", "completion"))

    def example(self, id: str, problem: str, working: str, answer: str, **meta: object) -> Example:
        """Puts a problem, its worked steps and its answer into the form that all these tasks share."""
        completion = f"{working.strip()}\n#### {answer}".strip()
        spans = {
            "number": (len(completion) - len(answer), len(completion)),
            "line": (completion.rindex("####"), len(completion)),
            "completion": (0, len(completion)),
        }
        prompt = f"{problem.strip()}\n\n{NUMBER_REQUEST}"
        return Example(prompt, completion, (spans[self.span],), id, {"answer": answer, **meta})

    def problem(self, example: Example) -> str:
        return super().problem(Example(example.prompt.removesuffix(NUMBER_REQUEST)))

    def extract(self, text: str) -> str | None:
        return final_number(text)

    def score(self, item: Example, text: str) -> float:
        return float(same_number(item.meta["answer"], final_number(text)))


def span_of(completion: str, answer: str, where: str) -> Span:
    """The last place where `answer` stands in `completion`."""
    start = completion.rfind(answer) if answer else -1
    if start < 0:
        raise SPDError(f"{where}: the answer {answer!r} does not occur in the completion")
    return start, start + len(answer)
