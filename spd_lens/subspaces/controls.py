"""Calibration examples made wrong on purpose: what a claim about gradients of correct answers is compared with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from spd_lens.errors import SPDError
from spd_lens.examples import Example, worked_examples


def shuffled_answers(examples: Sequence[Example], seed: int) -> list[Example]:
    """Every example with the correctness spans of another one: same prompts and formats, answers at random.

    The characters of the spans are exchanged between examples, the rest of the completions stays; an example never
    gets the answer it had. Where two examples have different numbers of spans, the donor's are taken in turn. Spans of
    prompts stay as they are, with their prompts.

    Raises:
        SPDError: fewer than two examples, an example without spans, or one answer that more than half of them share,
            so that no such exchange exists.
    """
    examples = worked_examples(examples)
    answers = [tuple(e.completion[start:end] for start, end in e.spans) for e in examples]
    if not all(answers):
        raise SPDError(
            "answers can be shuffled only between examples that all have correctness spans in their completions"
        )
    if len(examples) < 2:
        raise SPDError("answers can be shuffled only between two examples or more")
    most = max(answers.count(answer) for answer in set(answers))
    if 2 * most > len(examples):
        raise SPDError(
            f"{most} of {len(examples)} examples have the same answer, so that some would keep theirs; "
            "give examples with more varied answers"
        )
    # In order of answer, a shift by the largest group carries every example past its own group.
    rng = random.Random(seed)
    order = list(range(len(examples)))
    rng.shuffle(order)
    rank = {answer: i for i, answer in enumerate(rng.sample(sorted(set(answers)), len(set(answers))))}
    order.sort(key=lambda i: rank[answers[i]])
    donor = {i: order[(place + most) % len(order)] for place, i in enumerate(order)}
    return [with_answers(example, answers[donor[i]]) for i, example in enumerate(examples)]


def with_answers(example: Example, answers: Sequence[str]) -> Example:
    """The example with other characters in its spans, in turn; the spans move along. Marks are left out: they say what
    the gold completion computes and copies."""
    completion, spans, end_of_last = "", [], 0
    for n, (start, end) in enumerate(sorted(example.spans)):
        completion += example.completion[end_of_last:start]
        answer = answers[n % len(answers)]
        spans.append((len(completion), len(completion) + len(answer)))
        completion += answer
        end_of_last = end
    return replace(example, completion=completion + example.completion[end_of_last:], spans=tuple(spans), marks={})
