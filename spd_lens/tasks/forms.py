"""The answer forms that several tasks share: where the correctness span lies and how an answer is scored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from spd_lens.examples import Example, Span
from spd_lens.tasks.base import TwoScorings, normalised
from spd_lens.tasks.marks import copies, firsts
from spd_lens.tasks.scoring import reference
from spd_lens.tasks.scoring.letters import answer_letter, same_choice
from spd_lens.tasks.scoring.numbers import final_number, hash_lines
from spd_lens.tasks.scoring.reading import answer_part
from spd_lens.tasks.scoring.values import same_number

NUMBER_REQUEST = "Solve the problem step by step. End with a line that says '#### ' followed by the final number."
ALONE_REQUEST = "Give the answer alone, without any working: one line that says '#### ' followed by the final number."


@dataclass(kw_only=True)
class FinalNumber(TwoScorings):
    """Worked solutions that end on `#### N` (paper table 6: the span is the final numeric answer, 1-3 tokens)."""

    span: Literal["number", "line", "completion", "results", "answer-only"] = "number"
    """What decides correctness: the number alone (the paper), the whole `#### N` line, or everything; `results`: the
    values that the working computes, each where it first stands; `answer-only`: the number, asked for without working
    (see `answer_only`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_option("span", ("number", "line", "completion", "results", "answer-only"))

    @property
    def request(self) -> str:
        """The end of every prompt, which tells an instruct model the form of the answer."""
        return NUMBER_REQUEST

    def example(
        self, id: str, problem: str, working: str, answer: str, *, results: Sequence[Span] = (), **meta: object
    ) -> Example:
        """Puts a problem, its worked steps and its answer into the form that all these tasks share. `results` are the
        places in `working` at which a value is computed."""
        completion = f"{working.strip()}\n#### {answer}".strip()
        cut, number = len(working) - len(working.lstrip()), (len(completion) - len(answer), len(completion))
        made = Example(f"{problem.strip()}\n\n{self.request}", completion, (number,), id, {"answer": answer, **meta})
        return self.marked(made, [(start - cut, end - cut) for start, end in results])

    def marked(self, made: Example, results: Sequence[Span]) -> Example:
        """An example whose one span is its answer, with marks and with the span that the option asks for. An answer
        that does not stand in the working is computed where it is given."""
        (number,), completion = made.spans, made.completion
        marks = {"results": firsts(completion, [*results, number]), "copies": copies(completion, [number])}
        if self.span == "answer-only":
            return self.answer_only(made)
        spans = {
            "number": (number,),
            "line": ((completion.rfind("####"), len(completion)),),
            "completion": ((0, len(completion)),),
            "results": marks["results"],
        }
        return replace(made, spans=spans[self.span], marks=marks)

    def calibrates(self, example: Example) -> bool:
        return bool(example.spans)  # there are none where every result of a working stands earlier in it

    def answer_only(self, item: Example) -> Example:
        """The item with a request for the number alone in its prompt, and `#### N` as its completion. In the reference
        template, whose prompts say nothing of the form, the prompt stays."""
        answer = str(item.meta["answer"])
        blank, mark = " " * item.completion.startswith(" "), "#### " * ("####" in item.completion)
        completion = f"{blank}{mark}{answer}"
        number = (len(completion) - len(answer), len(completion))
        prompt = f"{self._asked(item.prompt)}{ALONE_REQUEST}" if self.asks_form else item.prompt
        return replace(item, prompt=prompt, completion=completion, spans=(number,), marks={"results": (number,)})

    def problem(self, example: Example) -> str:
        return normalised(self._asked(example.prompt))

    def _asked(self, prompt: str) -> str:
        """The prompt without the request at its end."""
        return prompt.removesuffix(self.request).removesuffix(ALONE_REQUEST)

    def extract(self, text: str) -> str | None:
        return reference.last_number(text) if self.scoring == "reference" else final_number(text)

    def check_scorable(self) -> None:
        if self.scoring == "reference":
            self.check_gold(reference.is_plain_number, "a plain number")

    def in_asked_form(self, text: str) -> bool:
        """Whether there is a line of `####` and a number."""
        asked = not self.asks_form or bool(hash_lines(answer_part(text), line_start=True))
        return asked and super().in_asked_form(text)

    def score(self, item: Example, text: str) -> float:
        if self.scoring == "reference":
            return float(reference.same_number(item.meta["answer"], text))
        return float(same_number(item.meta["answer"], final_number(text)))


ANSWER_MARK = "Answer: "
_ANSWER_LINE = re.compile(rf"^[ \t*]*+{ANSWER_MARK.strip()}[\s*]*+\S", re.MULTILINE | re.IGNORECASE)
LETTER_REQUEST = f"Reply with one line that says '{ANSWER_MARK}' followed by the letter of the right choice."


def answer_example(id: str, prompt: str, answer: str, *, whole_line: bool, meta: Mapping[str, object]) -> Example:
    """An example whose completion is `Answer: ...`, with what follows the mark (or the whole line) as its span."""
    completion = ANSWER_MARK + answer
    span = (0 if whole_line else len(ANSWER_MARK), len(completion))
    return Example(prompt, completion, (span,), id, {"answer": answer, **meta})


@dataclass(kw_only=True)
class AnswerLine(TwoScorings):
    """Answers on a line `Answer: ...`: a letter or a few words."""

    def answer_only(self, item: Example) -> Example:
        """The item itself, whose completion is nothing but the answer."""
        return item

    def in_asked_form(self, text: str) -> bool:
        """Whether there is a line `Answer: ...` from which the answer can be taken."""
        asked = not self.asks_form or _ANSWER_LINE.search(answer_part(text)) is not None
        return asked and super().in_asked_form(text)


@dataclass(kw_only=True)
class ChosenLetter(AnswerLine):
    """Multiple choice (paper table 6: the span is the letter after `Answer:`, 1 token)."""

    span: Literal["letter", "line"] = "letter"
    """What decides correctness: the letter (the paper), or the whole line `Answer: B`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_option("span", ("letter", "line"))

    def example(
        self, id: str, question: str, choices: Sequence[str], answer: int, *, intro: str = "", **meta: object
    ) -> Example:
        """Puts a question and its choices into the form that all these tasks share; `answer` is a position."""
        choices = [choice.strip() for choice in choices]
        listed = "\n".join(f"{chr(65 + index)}. {choice}" for index, choice in enumerate(choices))
        prompt = f"{intro}{question.strip()}\n{listed}\n\n{LETTER_REQUEST}"
        meta = {"question": question.strip(), "choices": choices, **meta}
        return answer_example(id, prompt, chr(65 + answer), whole_line=self.span == "line", meta=meta)

    def problem(self, example: Example) -> str:
        """The question with its choices in whatever order: a repeated question may be shuffled."""
        return normalised("\n".join([example.meta["question"], *sorted(example.meta["choices"])]))

    def choices(self, item: Example) -> tuple[str, ...]:
        start, end = item.spans[0]
        before = item.completion[start:end].removesuffix(item.meta["answer"])  # nothing, "Answer: ", or a space
        return tuple(f"{before}{chr(65 + index)}" for index in range(len(item.meta["choices"])))

    def extract(self, text: str) -> str | None:
        return reference.first_letter(text) if self.scoring == "reference" else answer_letter(text)

    def score(self, item: Example, text: str) -> float:
        if self.scoring == "reference":
            return float(reference.first_letter(text) == item.meta["answer"])
        return float(same_choice(item.meta["answer"], item.meta["choices"], text))
