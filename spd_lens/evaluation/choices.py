"""Multiple choice by log-likelihood: the most probable of the answers that may stand in an item's span."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from spd_lens.evaluation.teacher_forced import ForcedBatch, forced_logits
from spd_lens.examples import Example
from spd_lens.models import ModelPair, neutrally, token_losses
from spd_lens.output import progress_bar
from spd_lens.subspaces import Policy, with_answers


@neutrally
@torch.no_grad()
def most_likely(
    pair: ModelPair,
    items: Sequence[Example],
    choices: Mapping[str, Sequence[str]],
    policy: Policy,
    *,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> dict[str, str]:
    """For each item the choice whose span tokens have the largest summed log-probability after the item's prompt.

    Args:
        pair: The model pair.
        items: Items whose span each choice is put into.
        choices: The texts that may stand in the span, by item id.
        policy: The policy whose probabilities are compared.
        batch_tokens: Padded tokens per batch.
        progress: Whether to show a progress bar.
    """
    variants = [(item.id, choice, with_answers(item, [choice])) for item in items for choice in choices[item.id]]
    encoded = [pair.encode(variant) for _, _, variant in variants]
    scores: dict[str, dict[str, float]] = {item.id: {} for item in items}
    with policy.applied(pair) as model, progress_bar(progress, total=len(variants), desc="choices") as bar:
        for indices in pair.batches(encoded, batch_tokens):
            batch = ForcedBatch.of([encoded[i] for i in indices], pair)
            losses = token_losses(forced_logits(pair, model, batch), batch.target)
            for i, index in enumerate(indices):
                id, choice, _ = variants[index]
                scores[id][choice] = -losses[batch.scored[i]].sum().item()
            bar.update(len(indices))
    return {id: max(found, key=lambda choice: found[choice]) for id, found in scores.items()}
