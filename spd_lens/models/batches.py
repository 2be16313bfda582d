"""Which texts share a pass: those of similar length, within a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence


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
