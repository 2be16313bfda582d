"""Differences over items and draws at once: both are samples, and both belong into the interval.

An estimator is measured on `n` items under each of `D` draws of calibration examples. Items share what a draw did and
draws share what an item is like (crossed random effects), so that neither `n`, `D` nor `n D` independent numbers stand
behind a mean. The variance here is the sum of the two one-way variances, of the items' means and of the draws' means:
Owen's (2007, "The pigeonhole bootstrap") conservative bound, in which the noise of single cells is counted twice.
Intervals are Student's t with Satterthwaite's degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy import stats

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
    p_holm: float = math.nan
    """Corrected over the comparisons that were made together (Holm 1979): see `corrected_differences`."""
    detectable: float = math.nan
    """The smallest difference that would have been told from 0 with probability 0.8 at this noise, after correction."""

    @property
    def shown(self) -> str:
        """`"higher"` or `"lower"` where the corrected test tells it from 0, else empty."""
        return ("higher" if self.value > 0 else "lower") if self.p_holm < ALPHA else ""


def crossed_difference(own: Draws, reference: Draws, *, paired: bool) -> CrossedDifference:
    """Mean of `own - reference` over the same items, with draws on either side.

    Args:
        own: One number per draw and item; two or more of each.
        reference: The same of what it is compared with.
        paired: Draws of the two belong together, such as one set of calibration examples: their differences are the
            sample. Otherwise the reference's draws are what chance gives, such as random subspaces, and the null is
            that `own` is one more of them, perhaps one and the same in every draw: of their variance `s²`,
            `s² (1 + 1/R)` counts, not `s² / R`, which would ask for no more than to beat their average, as half of them
            do.

    Raises:
        SPDError: fewer than two draws or items, other items, or numbers that are not finite.
    """
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
    by_item = own.mean(axis=0) - reference.mean(axis=0)
    parts = [(by_item, 1 / by_item.size)]
    if paired:
        parts.append(((own - reference).mean(axis=1), 1 / len(own)))
    else:
        parts += [(own.mean(axis=1), 1 / len(own)), (reference.mean(axis=1), 1 + 1 / len(reference))]
    variances = [(float(means.var(ddof=1)) * share, means.size - 1) for means, share in parts]
    value, total = float(by_item.mean()), sum(variance for variance, _ in variances)
    if total == 0:
        return CrossedDifference(value, value, value, float(value == 0), 0.0, float(by_item.size - 1))
    df = total**2 / sum(variance**2 / n for variance, n in variances)
    se = math.sqrt(total)
    reach = float(stats.t.ppf(1 - ALPHA / 2, df)) * se
    return CrossedDifference(value, value - reach, value + reach, float(2 * stats.t.sf(abs(value) / se, df)), se, df)


def corrected_differences(family: Sequence[CrossedDifference]) -> list[CrossedDifference]:
    """The differences of one family with `p_holm` and `detectable`.

    A difference of `se (t(1 - α/2m) + t(0.8))` is told from 0 with probability 0.8 by a test at level `α/m`, at which
    Holm's correction of `m` comparisons begins.
    """
    level = 1 - ALPHA / (2 * max(1, len(family)))
    return [
        replace(one, p_holm=p, detectable=one.se * float(stats.t.ppf(level, one.df) + stats.t.ppf(POWER, one.df)))
        for one, p in zip(family, holm(one.p for one in family), strict=True)
    ]
