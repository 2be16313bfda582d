"""Tests of many paired differences at once: sign flips for each, Holm's correction for all.

A table of methods, tasks and measures has dozens of differences, and at 5 % each some of them look like effects by
chance alone. `sign_flip` gives each difference its p-value, `holm` makes the p-values of one family comparable with a
level that holds for the whole family.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from spd_lens.errors import SPDError
from spd_lens.stats.intervals import Values

_BATCH = 4_000_000
"""Signs at once: bounds memory to 32 MB."""


def sign_flip(differences: Iterable[float], *, n_flips: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of the mean of paired differences: how often random signs give a mean as far from 0.

    Under the null, an item's difference is as likely to have either sign (Fisher 1935; Good 2005). Items are the units:
    differences of an item under several seeds are averaged first, as `statistics.clustered_difference` does, so that
    test and interval are about the same sample. Items that do not differ say nothing and change nothing. All sign
    patterns are enumerated where there are no more than `n_flips + 1`, else `n_flips` are drawn and the observed one is
    counted with them, so that the p-value is never 0 and never too small (Phipson & Smyth 2010). On differences of 0/1
    scores all patterns give McNemar's exact test.

    Raises:
        SPDError: no or non-finite differences, or fewer than 99 flips.
    """
    values = np.asarray(list(differences), dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise SPDError(f"a sign-flip test needs finite differences, at least one, but got {values.tolist()!r:.80}")
    if n_flips < 99:
        raise SPDError(f"a sign-flip test needs at least 99 flips, not {n_flips}")
    values = values[values != 0]
    n = values.size
    if n == 0:
        return 1.0
    total = float(values.sum())
    # sums in another order differ by rounding; a pattern that ties with the observed one must count
    extreme = abs(total) - 1e-12 * float(np.abs(values).sum())
    if 2**n <= n_flips + 1:
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float(np.mean(_flipped(patterns, values, total) >= extreme))
    rng = np.random.default_rng(seed)
    rows = max(1, _BATCH // n)
    hits = 0
    for start in range(0, n_flips, rows):
        size = min(rows, n_flips - start) * n
        bits = np.unpackbits(np.frombuffer(rng.bytes((size + 7) // 8), dtype=np.uint8), count=size)
        hits += int(np.sum(_flipped(bits.reshape(-1, n), values, total) >= extreme))
    return (1 + hits) / (1 + n_flips)


def holm(p_values: Iterable[float]) -> list[float]:
    """Holm's (1979) step-down adjusted p-values, in the order given.

    Comparing them with 0.05 keeps the chance of any false claim in the family at 5 %, however the tests depend on
    each other. An empty family has none. As `statsmodels.multipletests`, which collects garbage at every call.
    """
    values = np.asarray(list(p_values), dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():  # also catches NaN
        raise SPDError(f"p-values must lie between 0 and 1, but one is {values[~((values >= 0) & (values <= 1))][0]}")
    order = np.argsort(values)
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)).clip(max=1.0)
    return adjusted.tolist()


def _flipped(kept: np.ndarray, values: Values, total: float) -> np.ndarray:
    """|Σ ±d| for rows of 0/1: what keeps its sign minus what is flipped."""
    return np.abs(2 * (kept.astype(np.float64) @ values) - total)
