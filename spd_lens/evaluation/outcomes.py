"""The outcomes of a policy side by side, since none of them alone is what the policy does to correctness."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import resources

from spd_lens.errors import SPDError
from spd_lens.evaluation.teacher_forced import ForcedItem, ForcedPasses, teacher_forced
from spd_lens.examples import Example
from spd_lens.models import ModelPair
from spd_lens.subspaces import Policy
from spd_lens.tasks import Task

NEUTRAL = "neutral"
"""Name of the set of other texts, `other_texts`."""
OUTCOMES: Mapping[str, str] = {
    "aligned_loss": "aligned loss",
    "copies_loss": "copied-answer loss",
    "results_loss": "results loss",
    "answer_only_loss": "answer-only loss",
    "rest_loss": "loss on the rest",
    "completion_loss": "completion loss",
    "kl": "KL from base",
    "token_accuracy": "token accuracy",
}
"""Teacher-forced measures: the attribute of a `ForcedItem` and a short heading. Losses and KL are in nats per token."""
SAYS: Mapping[str, str] = {
    "aligned_loss": "The loss on the tokens that the task scores, also where they can be copied from earlier ones.",
    "copies_loss": "The loss on tokens of the answer whose value stands earlier in the solution: copying is enough.",
    "results_loss": "The loss on each value of the solution at the place where it is computed: copying is not enough.",
    "answer_only_loss": "The loss on the answer where it is asked for without reasoning: no solution helps.",
    "rest_loss": "The loss on tokens of the gold solution that are neither results nor copies: its wording.",
    "completion_loss": "The loss on all tokens of the gold solution.",
    "kl": "How far the policy is from the base on all tokens of the gold solution, for better or worse.",
    "token_accuracy": "The share of the gold solution's tokens that are the most probable next one.",
}
"""What each of them says."""


def other_texts(n: int | None = None) -> list[Example]:
    """24 short paragraphs of plain English prose on weather, gardens, tools and travel, written for this project.

    The whole text is the span, so that the aligned loss of `teacher_forced` is the loss per token.

    Args:
        n: How many, from the first on; None: all.
    """
    lines = resources.files("spd_lens.evaluation").joinpath("neutral.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for record in map(json.loads, lines[:n]):
        prompt = f"Write a few sentences about {record['topic']}."
        found.append(Example(prompt, record["text"], ((0, len(record["text"])),), record["id"]))
    return found


def fitting(pair: ModelPair, examples: Iterable[Example]) -> list[Example]:
    """The examples that fit the model's context and have tokens to measure."""
    return [example for example in examples if _fits(pair, example)]


def _fits(pair: ModelPair, example: Example) -> bool:
    try:
        pair.encode(example)
    except SPDError:
        return False
    return True


def with_answer_only(
    pair: ModelPair,
    task: Task,
    items: Sequence[Example],
    policies: Sequence[Policy],
    found: Mapping[str, Sequence[ForcedItem]],
    *,
    passes: ForcedPasses | None = None,
    progress: bool = True,
) -> dict[str, list[ForcedItem]]:
    """What `teacher_forced` found, with the loss on each answer where it is asked for without reasoning.

    Where the task asks for an item's answer alone anyway, that is the aligned loss. Items without such a form, or whose
    form does not fit the model's context, have None.

    Args:
        pair: The model.
        task: The items' task.
        items: Items that were measured.
        policies: Policies that are measured now; others in `found` stay as they are.
        found: By the policy's name, one measured item per item of `items`.
        passes: As for `teacher_forced`.
        progress: Whether to show a progress bar.
    """
    forms = {item.id: form for item in items if (form := task.answer_only(item)) is not None}
    same = {item.id for item in items if forms.get(item.id) == item}
    asked = fitting(pair, [form for id, form in forms.items() if id not in same])
    again = teacher_forced(pair, asked, policies, passes=passes, progress=progress) if asked else {}
    result = {name: list(measured) for name, measured in found.items()}
    for policy in policies:
        losses = {item.id: item.aligned_loss for item in again.get(policy.name, [])}
        losses |= {item.id: item.aligned_loss for item in found[policy.name] if item.id in same}
        result[policy.name] = [replace(item, answer_only_loss=losses.get(item.id)) for item in found[policy.name]]
    return result
