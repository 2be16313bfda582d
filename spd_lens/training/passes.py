"""A step's sequences in passes of similar length; the fastest attention; whether activations fit into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spd_lens.models import ModelPair
from spd_lens.models.memory import free_memory

_PASS_COSTS = {"cpu": 48, "cuda": 1024}
"""Tokens that take as long as starting one more pass: a GPU is not busy with fewer."""

_SHORT = 512
"""Tokens up to which attention weights are small beside the other activations."""


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


def passes(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """A padded batch as several, each cut to its longest row."""
    lengths: list[int] = batch["attention_mask"].sum(1).tolist()
    groups = split_by_length(lengths, _PASS_COSTS.get(batch["input_ids"].device.type, 0))
    return [{name: value[group, : max(lengths[i] for i in group)] for name, value in batch.items()} for group in groups]


@contextlib.contextmanager
def fastest_attention(model: Any, length: int) -> Iterator[None]:
    """In bfloat16 on a CPU plain matrix products: torch's kernel takes 2.5 times as long there, forth and back.

    They keep all attention weights for the backward pass, so not where sequences are long.
    """
    own = model.config._attn_implementation
    if own != "sdpa" or model.dtype != torch.bfloat16 or model.device.type != "cpu" or length > _SHORT:
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def needs_checkpointing(pair: ModelPair, n_tokens: int, n_trained: int) -> bool:
    """Whether a pass of `n_tokens` that keeps all activations would take more than half of what memory is left.

    A layer keeps at most about 34 values per token and unit of `d_model` (Korthikanti et al. 2022, section 4). AdamW
    keeps 12 bytes, gradient included, per weight that it trains.
    """
    activations = 34 * pair.n_layers * pair.fingerprint.d_model * pair.dtype.itemsize * n_tokens
    return activations > (free_memory(pair.device) - 12 * n_trained) / 2
