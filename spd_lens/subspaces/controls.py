"""Calibration examples made wrong on purpose: what a claim about gradients of correct answers is compared with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal

import numpy as np
from scipy.optimize import linear_sum_assignment

from spd_lens.errors import SPDError
from spd_lens.examples import Example, worked_examples
from spd_lens.tasks import value_of


def shuffled_answers(examples: Sequence[Example], seed: int) -> list[Example]:
    """Every example with the correctness spans of another one: same prompts and formats, answers at random.

    The characters of the spans are exchanged between examples, the rest of the completions stays; no span gets the
    value it had. Where two examples have different numbers of spans, the donor's are taken in turn. Spans of prompts
    stay as they are, with their prompts.

    Raises:
        SPDError: fewer than two examples, an example without spans, or answers so alike that no such exchange exists,
            as one that more than half of the examples share.
    """
    examples = worked_examples(examples)
    answers = [tuple(e.completion[start:end] for start, end in sorted(e.spans)) for e in examples]
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
    values = [tuple(map(value_of, answer)) for answer in answers]
    if any(_keeps(own, values[donor[i]]) for i, own in enumerate(values)):
        donor = _assigned(values, np.random.default_rng(seed))
    return [with_answers(example, answers[donor[i]]) for i, example in enumerate(examples)]


def _assigned(values: Sequence[Sequence[Decimal | str]], rng: np.random.Generator) -> dict[int, int]:
    """A donor for each example such that no span gets the value it had, drawn at random: examples with several spans
    can share one value and not the others, which a shift of whole answers overlooks."""
    cost = rng.uniform(0, 0.5 / len(values), (len(values), len(values)))
    cost += [[_keeps(own, other) for other in values] for own in values]
    rows, columns = linear_sum_assignment(cost)
    if keeping := int(cost[rows, columns].sum()):
        raise SPDError(
            f"however answers are exchanged between these {len(values)} examples, {keeping} of them would keep a "
            "value at its place; give examples with more varied answers, or choose another span"
        )
    return dict(zip(rows.tolist(), columns.tolist(), strict=True))


def _keeps(own: Sequence[Decimal | str], other: Sequence[Decimal | str]) -> bool:
    """Whether a span of an example would get the value it has, if it were given another one's answers in turn."""
    return any(value == other[n % len(other)] for n, value in enumerate(own))


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
