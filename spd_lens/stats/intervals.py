"""How sure a score is: intervals, paired comparisons and several seeds.

Everything numerical comes from `scipy.stats` and `statsmodels`; this module chooses the method, refuses what has no
answer and says in `Estimate.method` what was done. Which function for what:

| question | function |
| --- | --- |
| accuracy of one model (0/1 or fractional scores) | `score_interval`, `wilson` |
| mean of any per-item measure (NLL, KL) | `mean_interval` |
| two models on the same items | `paired_difference`; for 0/1 scores `mcnemar_exact` decides |
| one number per seed | `seed_summary` |
| every item scored under every seed | `clustered_mean`, `clustered_difference` |
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from spd_lens.errors import SPDError
from spd_lens.stats.estimate import Estimate, decimals

Values = Float[np.ndarray, " item"]
Scores = Mapping[Hashable, Mapping[Hashable, float]] | Sequence[Sequence[float]] | np.ndarray
"""`scores[seed][item]`: a mapping of mappings, or a rectangle `(n_seeds, n_items)`."""

MIN_BOOTSTRAP = 10
"""Below this many values a bootstrap interval of a mean is clearly too short (about 83 % coverage at n = 5 for a
nominal 95 %), so Student's t is used."""
_CONFIDENCE = 0.95
TOO_FEW, WITHIN_NOISE = "too few items", "within noise"
"""Verdicts on a difference that is not shown to go in either direction."""


class McNemar(NamedTuple):
    """Result of `mcnemar_exact`."""

    p_value: float
    n_only_a: int
    """Items that only `a` got right."""
    n_only_b: int
    """Items that only `b` got right."""


@dataclass(frozen=True)
class SeedSummary:
    """One number per seed, summed up. Prints as `0.42 [0.38, 0.46] (n=5), sd 0.03 over seeds`."""

    estimate: Estimate
    """Mean over seeds with Student's t interval; its `n` counts seeds."""
    sd: float
    """Sample standard deviation (`ddof=1`) over seeds; NaN for one seed."""

    def __str__(self) -> str:
        spread = "sd unknown (one seed)" if math.isnan(self.sd) else f"sd {self.sd:.{decimals(self.sd)}f} over seeds"
        return f"{self.estimate}, {spread}"


def wilson(successes: float, n: int, *, confidence: float = 0.95) -> Estimate:
    """Share of successes with its Wilson score interval (Wilson 1927; `statsmodels.proportion_confint`).

    `successes` may be a sum of fractional scores in [0, 1]: at the same mean they spread no more than 0/1 scores, so
    the interval is then conservative, and `method` says so. `score_interval` gives the tighter one from the scores.
    """
    _check_confidence(confidence)
    if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1:
        raise SPDError(f"a share needs a whole number of items, at least 1, but n is {n!r}")
    if not 0 <= successes <= n:  # also catches NaN
        raise SPDError(f"successes must lie between 0 and n = {n}, but are {successes!r}")
    low, high = proportion_confint(float(successes), int(n), alpha=1 - confidence, method="wilson")
    fractional = float(successes) != int(successes)
    note = " (conservative: fractional scores)" if fractional else ""
    value = float(successes) / n
    # Rounding can leave the end at 0 or 1 a hair inside the value.
    low, high = min(max(float(low), 0.0), value), max(min(float(high), 1.0), value)
    return Estimate(value, low, high, int(n), f"Wilson {_percent(confidence)}{note}")


def score_interval(scores: Iterable[float], *, confidence: float = 0.95) -> Estimate:
    """Mean of scores in [0, 1]: Wilson where all are 0 or 1, else a BCa bootstrap.

    Fewer than ten fractional scores, or constant ones, give no usable bootstrap and get the conservative Wilson
    interval.
    """
    values = _values(scores, "scores")
    outside = values[(values < 0) | (values > 1)]
    if outside.size:
        raise SPDError(f"scores must lie in [0, 1], but one is {outside[0]}; use mean_interval for other measures")
    fractional = bool(np.any((values != 0) & (values != 1)))
    if fractional and values.size >= MIN_BOOTSTRAP and np.ptp(values) > 0:
        return mean_interval(values, confidence=confidence)
    # fsum, so that a mean of 0/1 scores stays an exact count
    return wilson(min(math.fsum(values), values.size), values.size, confidence=confidence)


def mean_interval(
    values: Iterable[float], *, confidence: float = 0.95, seed: int = 0, n_resamples: int = 9999
) -> Estimate:
    """Mean with its BCa bootstrap interval (Efron 1987; `scipy.stats.bootstrap`), reproducible through `seed`.

    Fallbacks, each named in `method`: one value has no interval; constant values have one of width zero, which says
    nothing on confidence; below ten values Student's t; the percentile bootstrap where BCa is undefined.
    """
    return _mean(_values(values, "values"), confidence, seed, n_resamples, "")


def paired_difference(
    a: Iterable[float], b: Iterable[float], *, confidence: float = 0.95, seed: int = 0, n_resamples: int = 9999
) -> Estimate:
    """Mean of `b - a` over the same items, with a paired bootstrap interval (items are drawn, each with both scores).

    For 0/1 scores with few disagreements the bootstrap is too eager (two equal models that disagree on about 5 of 100
    items get an interval without 0 in one comparison out of ten); let `mcnemar_exact` decide there and pass its
    result to `difference_sentence`. If all 0/1 scores differ by the same amount there is nothing to resample, and the
    interval comes from Wilson's for the share of such items: agreement on ten items is no proof of agreement.
    """
    first, second = _pair(a, b)
    difference = second - first
    if np.ptp(difference) == 0 and _is_binary(first) and _is_binary(second):
        return _equal_differences(difference, confidence, "paired ")
    return _mean(difference, confidence, seed, n_resamples, "paired ")


def mcnemar_exact(a: Iterable[float], b: Iterable[float]) -> McNemar:
    """Exact two-sided McNemar test of two models' 0/1 scores on the same items (`statsmodels.mcnemar`).

    One score per item: with several seeds, items repeat and the test no longer holds; use `clustered_difference`.
    """
    first, second = _pair(a, b)
    for name, values in (("a", first), ("b", second)):
        if not _is_binary(values):
            odd = values[(values != 0) & (values != 1)][0]
            raise SPDError(f"McNemar's test needs 0/1 scores, but {name} holds {odd}; use paired_difference")
    right_a, right_b = first == 1, second == 1
    both, neither = int(np.sum(right_a & right_b)), int(np.sum(~right_a & ~right_b))
    only_a, only_b = int(np.sum(right_a & ~right_b)), int(np.sum(~right_a & right_b))
    result = mcnemar([[both, only_a], [only_b, neither]], exact=True)
    return McNemar(min(1.0, float(result.pvalue)), only_a, only_b)


def seed_summary(values_by_seed: Mapping[Hashable, float] | Iterable[float]) -> SeedSummary:
    """Mean, standard deviation and Student's t interval of one number per seed; here the seeds are the sample."""
    raw = values_by_seed.values() if isinstance(values_by_seed, Mapping) else values_by_seed
    values = _values(raw, "values by seed")
    sd = float(np.std(values, ddof=1)) if values.size > 1 else math.nan
    return SeedSummary(_t_interval(values, _CONFIDENCE, "over seeds"), sd)


def clustered_mean(scores: Scores, *, n_resamples: int = 9999) -> Estimate:
    """Mean of `scores[seed][item]` with a cluster bootstrap by item (Field & Welsh 2007); its `n` counts items.

    An item is drawn together with its scores under all seeds: repeating an item under more seeds is no new item. As
    every item has every seed, this is the bootstrap of the items' means. The interval is about other items with these
    seeds; what other seeds would do is `seed_summary`'s.
    """
    table, _ = _table(scores, "scores")
    means, label = table.mean(axis=0), f"by item over {len(table)} seed(s), "
    if _is_binary(table) and np.ptp(means) == 0:  # all right or all wrong: resampling would claim certainty
        estimate = wilson(means[0] * means.size, means.size)
        return replace(estimate, method=label + estimate.method)
    return _mean(means, _CONFIDENCE, 0, n_resamples, label)


def clustered_difference(a: Scores, b: Scores, *, seed: int = 0, n_resamples: int = 9999) -> Estimate:
    """Mean of `b - a` where both were scored as `scores[seed][item]` on the same items; clusters are items.

    The two may have different seeds, and different numbers of them: each item's mean over seeds is what is paired.
    """
    (first, items_a), (second, items_b) = _table(a, "a"), _table(b, "b")
    if items_a != items_b:
        if items_a is None or items_b is None or set(items_a) != set(items_b):
            raise SPDError("a and b were scored on different items; compare them on the items they share")
        second = second[:, [items_b.index(item) for item in items_a]]
    if first.shape[1] != second.shape[1]:
        raise SPDError(f"a has {first.shape[1]} items and b has {second.shape[1]}; they must be the same items")
    label = f"paired by item over {len(first)} and {len(second)} seed(s), "
    difference = second.mean(axis=0) - first.mean(axis=0)
    if np.ptp(difference) == 0 and _is_binary(first) and _is_binary(second):
        return _equal_differences(difference, _CONFIDENCE, label)
    return _mean(difference, _CONFIDENCE, seed, n_resamples, label)


def within_noise(estimate: Estimate) -> bool:
    """Whether the interval of a difference contains 0."""
    return estimate.low <= 0 <= estimate.high


def verdict(difference: Estimate, p_value: float | None = None, alpha: float = 0.05) -> str:
    """`"higher"`, `"lower"`, `"within noise"` unless the interval and the test, if any, exclude chance, or `"too few
    items"` where there is no interval."""
    if not difference.bounded:
        return TOO_FEW
    if within_noise(difference) or (p_value is not None and p_value >= alpha):
        return WITHIN_NOISE
    return "higher" if difference.value > 0 else "lower"


def difference_sentence(
    estimate: Estimate, *, measure: str, first: str, second: str, test: McNemar | None = None, alpha: float = 0.05
) -> str:
    """One sentence for a report on `second - first`, which claims a difference only where the data carry it.

    With `test`, both the interval and McNemar's test have to exclude chance.
    """
    evidence = f"{measure}, {second} minus {first}: {estimate}"
    if test is not None:
        evidence += f", exact McNemar p = {test.p_value:.2g} (only {first} {test.n_only_a}, only {second} "
        evidence += f"{test.n_only_b})"
    found = verdict(estimate, None if test is None else test.p_value, alpha)
    said = {TOO_FEW: f"{TOO_FEW} to say", WITHIN_NOISE: WITHIN_NOISE}.get(found, f"{second} is {found}")
    return f"{evidence}; {said}."


def bootstrap_ends(
    columns: Sequence[Values],
    statistic: Callable[..., Any],
    *,
    method: str = "percentile",
    confidence: float = 0.95,
    n_resamples: int = 9999,
    seed: int = 0,
    vectorized: bool = True,
) -> tuple[float, float]:
    """The ends of a bootstrap interval (`scipy.stats.bootstrap`), reproducible through `seed`.

    Args:
        columns: Values of the same units; a unit is drawn with its value in every column.
        statistic: Function of the columns; where `vectorized`, along the axis that it is given as `axis`.
        method: `percentile` or `BCa`, whose ends are NaN where it is undefined.
        confidence: Confidence of the interval.
        n_resamples: Number of resamples.
        seed: Seed of the resampling.
        vectorized: Whether the statistic takes all resamples at once.
    """
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # the caller sees NaN
        result = stats.bootstrap(
            tuple(columns), statistic, method=method, confidence_level=confidence, n_resamples=n_resamples,
            batch=max(1, 4_000_000 // len(columns[0])),  # bounds memory: 32 MB a batch, however many items
            paired=len(columns) > 1, vectorized=vectorized, rng=np.random.default_rng(seed),
        )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _mean(values: Values, confidence: float, seed: int, n_resamples: int, label: str) -> Estimate:
    _check_confidence(confidence)
    if n_resamples < 100:
        raise SPDError(f"a bootstrap needs at least 100 resamples, not {n_resamples}")
    n, mean = values.size, float(np.mean(values))
    if n >= 2 and np.ptp(values) == 0:
        constant = float(values[0])  # the mean of equal values can be off by a rounding error
        return Estimate(constant, constant, constant, n, f"{label}constant values, no spread to resample")
    if n < MIN_BOOTSTRAP:
        return _t_interval(values, confidence, f"{label}fewer than {MIN_BOOTSTRAP} values")
    for method in ("BCa", "percentile"):  # where BCa is undefined, percentile follows
        low, high = bootstrap_ends(
            [values], np.mean, method=method, confidence=confidence, n_resamples=n_resamples, seed=seed
        )
        if math.isfinite(low) and math.isfinite(high):
            break
    return Estimate(mean, low, high, n, f"{label}{method} bootstrap {_percent(confidence)}")


def _equal_differences(difference: Values, confidence: float, label: str) -> Estimate:
    """All items differ by the same `d` in [-1, 1]: at least Wilson's share of all items does; the rest may lie
    anywhere between -1 and 1."""
    d, n = float(difference[0]), difference.size
    share = wilson(n, n, confidence=confidence).low
    low, high = share * d - (1 - share), share * d + (1 - share)
    return Estimate(d, low, high, n, f"{label}Wilson bound {_percent(confidence)}, all differences equal")


def _t_interval(values: Values, confidence: float, note: str) -> Estimate:
    _check_confidence(confidence)
    n, mean = values.size, float(np.mean(values))
    if n < 2:
        return Estimate(mean, -math.inf, math.inf, n, "one value, no interval")
    if np.ptp(values) == 0:
        constant = float(values[0])
        return Estimate(constant, constant, constant, n, f"constant values, no spread ({note})")
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(confidence)
    return Estimate(mean, float(low), float(high), n, f"Student's t {_percent(confidence)} ({note})")


def _values(values: Iterable[float], name: str) -> Values:
    try:
        array = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SPDError(f"{name} must be numbers: {error}") from error
    if array.ndim != 1 or array.size == 0:
        raise SPDError(f"{name} must be a list of at least one number, but have shape {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise SPDError(f"{name} must be finite, but number {bad[0]} is {array[bad[0]]}; find out why, or leave it out")
    return array


def _pair(a: Iterable[float], b: Iterable[float]) -> tuple[Values, Values]:
    first, second = _values(a, "a"), _values(b, "b")
    if first.size != second.size:
        raise SPDError(f"a has {first.size} scores and b has {second.size}; they must be of the same items")
    return first, second


def _table(scores: Scores, name: str) -> tuple[np.ndarray, list[Hashable] | None]:
    """Scores as a rectangle `(seed, item)`, with the items' names where they have any."""
    if not len(scores):
        raise SPDError(f"{name} hold no seed; give scores[seed][item]")
    if not isinstance(scores, Mapping):
        rows = [_values(row, f"{name} of seed {i}") for i, row in enumerate(scores)]
        if len({row.size for row in rows}) > 1:
            raise SPDError(f"{name} have {sorted({row.size for row in rows})} items by seed; every seed needs all")
        return np.stack(rows), None
    items = list(next(iter(scores.values())))
    for seed, by_item in scores.items():
        odd = set(by_item) ^ set(items)
        if odd:
            raise SPDError(f"{name} of seed {seed!r} differ in item {min(odd, key=str)!r}; every seed needs all items")
    return np.stack([_values([row[i] for i in items], f"{name} of seed {s!r}") for s, row in scores.items()]), items


def _is_binary(values: Values) -> bool:
    return bool(np.all((values == 0) | (values == 1)))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise SPDError(f"confidence must lie between 0 and 1, such as 0.95, but is {confidence!r}")


def _percent(confidence: float) -> str:
    return f"{100 * confidence:g}%"
