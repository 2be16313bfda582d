"""Texts side by side in one pass: those of similar length, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def batches_by_length(lengths: Sequence[int], batch_tokens: int, apart: int | None = None) -> list[list[int]]:
    """Indices grouped by similar length; the largest batch first, so that a lack of memory shows at once and what it
    needed is there for the others.

    A batch holds at most `batch_tokens` tokens counting padding, and at least one row. Rows of more than `apart` tokens
    (`angles_change_beyond`) never share one with shorter rows.
    """
    batches: list[list[int]] = []
    limit = max(lengths, default=0) if apart is None else apart
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batches[-1][0]] if batches else 0
        alike = (longest > limit) == (lengths[index] > limit)
        if batches and alike and (len(batches[-1]) + 1) * longest <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return sorted(batches, key=lambda batch: -len(batch) * lengths[batch[0]])


def right_pad(
    rows: list[list[int]], pad_id: int, device: torch.device | str
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Token ids and attention mask of rows of unequal length."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    tokens = pad_sequence(ids, batch_first=True, padding_value=pad_id)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return tokens.to(device), mask.to(device)
