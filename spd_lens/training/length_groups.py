"""A step's sequences in passes of similar length; whether their activations fit into memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from spd_lens.models import ModelPair, free_memory
from spd_lens.training.loss import IGNORED

_PASS_COSTS = {"cpu": 48, "cuda": 16_384}
"""Tokens that take as long as starting one more pass: a GPU is not busy with fewer."""


def split_by_length(lengths: Sequence[int], pass_cost: int) -> list[list[int]]:
    """Indices in groups, such that padded tokens plus `pass_cost` per group are fewest; longest first.

    It depends on the lengths alone, so that a seed always means the same arithmetic.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    best, cut = [0], [0]
    for end in range(1, len(order) + 1):
        costs = [best[start] + (end - start) * lengths[order[start]] + pass_cost for start in range(end)]
        best.append(min(costs))
        cut.append(costs.index(best[end]))
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(sorted(order[cut[end] : end]))
        end = cut[end]
    return groups[::-1]


def passes(batch: dict[str, Tensor], apart: int | None = None, n_processes: int = 1) -> list[dict[str, Tensor]]:
    """A padded batch as several, each cut to its longest row; padding that is scored belongs to its row.

    Rows of more than `apart` tokens (`angles_change_beyond`) never share a pass with shorter rows. Where the rows of a
    pass are shared by `n_processes`, each has a part of its tokens, and starts it as one process would.
    """
    lengths: list[int] = (batch["attention_mask"].bool() | (batch["labels"] != IGNORED)).sum(1).tolist()
    groups = split_by_length(lengths, n_processes * _PASS_COSTS.get(batch["input_ids"].device.type, 0))
    if apart is not None:
        sides = [[[i for i in group if (lengths[i] > apart) == long] for long in (True, False)] for group in groups]
        groups = [side for both in sides for side in both if side]
    return [{name: value[group, : max(lengths[i] for i in group)] for name, value in batch.items()} for group in groups]


def needs_checkpointing(pair: ModelPair, n_tokens: int, n_trained: int) -> bool:
    """Whether a pass of `n_tokens` that keeps all activations would take more than half of what memory is left.

    AdamW keeps 12 bytes, gradient included, per weight that it trains.
    """
    return n_tokens * pair.n_layers * pair.kept_by_layer > (free_memory(pair.device) - 12 * n_trained) / 2
