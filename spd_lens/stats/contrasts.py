"""Differences over items and draws at once: both are samples, and both belong into the interval.

An estimator is measured on `n` items under each of `D` draws of calibration examples. Items share what a draw did and
draws share what an item is like (crossed random effects), so that neither `n`, `D` nor `n D` independent numbers stand
behind a mean. The variance here is the sum of the two one-way variances, of the items' means and of the draws' means:
Owen's (2007, "The pigeonhole bootstrap") conservative bound, in which the noise of single cells is counted twice.
Intervals are Student's t with Satterthwaite's degrees of freedom.

The variance of two or three draws is sometimes small by luck alone, and among many comparisons some are: in simulated
noise they made a discovery in 30 % of families of 48. So a comparison counts the variance of its draws as no less than
the mean of its family, with the degrees of freedom of its own. Then it is at most 5 %, also where estimators that see
the same draws go up and down together (`tests/stats/test_contrasts.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy import stats
from scipy.optimize import brentq

from spd_lens.errors import SPDError
from spd_lens.stats.corrections import holm

Draws = Float[np.ndarray, "draw item"]
ALPHA, POWER = 0.05, 0.8


@dataclass(frozen=True)
class CrossedDifference:
    """A mean difference over items and draws."""

    value: float
    low: float
    """Lower end of the 95 % interval, which is not corrected for other comparisons."""
    high: float
    p: float
    """Two-sided."""
    se: float
    """Standard error."""
    df: float
    """Degrees of freedom (Satterthwaite)."""
    p_holm: float
    """Corrected over the comparisons of its family (Holm 1979)."""
    detectable: float
    """The smallest difference that would have been told from 0 with probability 0.8 at this noise, after correction."""

    @property
    def shown(self) -> str:
        """`"higher"` or `"lower"` where the corrected test tells it from 0, else empty."""
        return ("higher" if self.value > 0 else "lower") if self.p_holm < ALPHA else ""


def crossed_difference(own: Draws, reference: Draws, *, paired: bool) -> CrossedDifference:
    """One difference by itself: see `crossed_differences`."""
    return crossed_differences([(own, reference, paired)])[0]


def crossed_differences(family: Sequence[tuple[Draws, Draws, bool]]) -> list[CrossedDifference]:
    """Mean of `own - reference` over the same items, with draws on either side, for every comparison of a family.

    Args:
        family: For each comparison `own` and `reference`, one number per draw and item with two or more of each, and
            whether draws of the two belong together, such as one set of calibration examples: then their differences
            are the sample. Otherwise the reference's draws are what chance gives, such as random subspaces, and the
            null is that `own` is one more of them, perhaps one and the same in every draw: of their variance `s²`,
            `s² (1 + 1/R)` counts, not `s² / R`, which would ask for no more than to beat their average, as half of them
            do.

    Returns:
        The differences, with `p_holm` over the family. `detectable` is the difference that is told from 0 with
        probability 0.8 (noncentral t) at level `α/m`, at which Holm's correction of `m` comparisons begins.

    Raises:
        SPDError: fewer than two draws or items, other items, or numbers that are not finite.
    """
    variances = [_variances(*one) for one in family]
    floor = {
        paired: float(np.mean([found[1][0] for found, one in zip(variances, family, strict=True) if one[2] is paired]))
        for paired in {one[2] for one in family}
    }
    level = 1 - ALPHA / (2 * max(1, len(family)))
    found = []
    for (own, reference, paired), (items, (draws, n), *chance) in zip(family, variances, strict=True):
        value = float((own.mean(axis=0) - reference.mean(axis=0)).mean())
        parts = [items, (max(draws, floor[paired]), n), *chance]
        total = sum(variance for variance, _ in parts)
        se, df = math.sqrt(total), float(items[1])
        if total > 0:
            df = total**2 / sum(variance**2 / n for variance, n in parts)
        reach = se * float(stats.t.ppf(1 - ALPHA / 2, df))
        p = float(2 * stats.t.sf(abs(value) / se, df)) if total > 0 else float(value == 0)
        detectable = se * _shift(float(stats.t.ppf(level, df)), df)
        found.append(CrossedDifference(value, value - reach, value + reach, p, se, df, p, detectable))
    return [replace(one, p_holm=p) for one, p in zip(found, holm(one.p for one in found), strict=True)]


def _shift(critical: float, df: float) -> float:
    """By how many standard errors the truth is off where `t` exceeds `critical` with probability 0.8."""
    return float(brentq(lambda shift: stats.nct.sf(critical, df, shift) - POWER, 0.0, 4 * critical + 4))


def _variances(own: Draws, reference: Draws, paired: bool) -> list[tuple[float, int]]:
    """The variance of the mean from items, from own draws and, if unpaired, from chance; with degrees of freedom."""
    shapes = {own.shape[1:], reference.shape[1:]}
    if own.ndim != 2 or reference.ndim != 2 or len(shapes) > 1 or min(*own.shape, len(reference)) < 2:
        raise SPDError(
            "a difference over items and draws needs the same two or more items under two or more draws, but has "
            f"{own.shape} and {reference.shape}"
        )
    if paired and own.shape != reference.shape:
        raise SPDError(f"paired draws must be as many on both sides, not {len(own)} and {len(reference)}")
    if not (np.isfinite(own).all() and np.isfinite(reference).all()):
        raise SPDError("a difference over items and draws needs finite numbers; leave out items that have none")
    means = [(own.mean(axis=0) - reference.mean(axis=0), 1 / own.shape[1])]
    if paired:
        means.append(((own - reference).mean(axis=1), 1 / len(own)))
    else:
        means += [(own.mean(axis=1), 1 / len(own)), (reference.mean(axis=1), 1 + 1 / len(reference))]
    return [(float(of_units.var(ddof=1)) * share, of_units.size - 1) for of_units, share in means]
