"""Is a subspace better than random ones of its shape? Two sources of chance, items and random draws, in one interval.

With a handful of draws per cell, how far random subspaces scatter is hardly known from one cell, and it is no small
matter: on SmolLM2 the aligned loss under five of them ranged over a factor of two. So the scatter, relative to the
size of the effect, is shared between cells by the empirical Bayes rule of Smyth (2004, "limma").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy import optimize, special, stats

from spd_lens.errors import SPDError
from spd_lens.stats import holm

Items = Float[np.ndarray, " item"]
Draws = Float[np.ndarray, "draw item"]


@dataclass(frozen=True)
class Contrast:
    """A subspace's effect minus that of random ones."""

    value: float
    low: float
    high: float
    p: float
    """Two-sided, of the null that the subspace is one more random one."""
    p_holm: float
    """Corrected over all contrasts that were made together (Holm 1979)."""
    df: float
    """Degrees of freedom of the t interval (Satterthwaite)."""

    def columns(self, name: str) -> dict[str, float]:
        """Value and interval as columns of a table."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def beside_random(random: Draws, against: Contrast) -> dict[str, float]:
    """Columns of a table: what random subspaces do, with the range over draws, and how far a subspace is from it."""
    means = random.mean(axis=1)
    found = {"random": means.mean(), "random_low": means.min(), "random_high": means.max()}
    return {**{name: float(value) for name, value in found.items()}, **against.columns("difference"), "p": against.p}


def contrasts(effects: Sequence[Items], controls: Sequence[Draws]) -> list[Contrast]:
    """Each effect minus the mean over its random draws, with 95 % intervals.

    The variance is that of the paired differences over items, `s²_item / n`, plus that of a single new draw against
    the mean of `R`, `s²_draw (1 + 1/R)`: the question is whether the subspace lies outside of what random ones do, not
    whether it beats their average, which half of them do. Both count the draws' noise over items, so the interval is
    on the safe side. It is not corrected for the number of cells; `p_holm` is.

    Args:
        effects: For each cell the change of every item under its subspace.
        controls: For each cell the same under `R >= 2` random subspaces of its shape.
    """
    for own, random in zip(effects, controls, strict=True):
        if random.ndim != 2 or random.shape[0] < 2 or random.shape[1:] != own.shape or own.size < 2:
            raise SPDError(
                f"a contrast needs the same two or more items under two or more random subspaces, but has {own.shape} "
                f"and {random.shape}"
            )
    # With the subspace's own effects among them: under the null it is one more draw, and a scale without it would be
    # too small just where the draws are small by luck (simulated: some discovery in 14 to 33 % of sweeps of noise).
    together = [np.vstack([own[None], random]) for own, random in zip(effects, controls, strict=True)]
    scatter, draw_df = moderated(
        np.array([random.mean(axis=1).var(ddof=1) for random in controls]),
        np.array([random.shape[0] - 1 for random in controls]),
        np.array([np.mean(rows**2) for rows in together]),
    )
    found = [
        _contrast(own, random, float(s), float(df))
        for own, random, s, df in zip(effects, controls, scatter, draw_df, strict=True)
    ]
    corrected = holm(c.p for c in found)
    return [replace(c, p_holm=p) for c, p in zip(found, corrected, strict=True)]


def moderated(
    variances: Float[np.ndarray, " cell"], df: Float[np.ndarray, " cell"], scales: Float[np.ndarray, " cell"]
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Variances, shrunk towards what their scale predicts, with their degrees of freedom (Smyth 2004, section 6.2).

    `variance / scale` is taken as a scaled F variable; prior variance and prior degrees of freedom come from mean and
    spread of its logarithm. Where variances differ no more than chance, all cells share one; with fewer than three
    cells every one keeps its own.
    """
    usable = (variances > 0) & (scales > 0)
    if usable.sum() < 3:
        return variances, df.astype(float)
    ratio, half = variances[usable] / scales[usable], df[usable] / 2
    log_ratio = np.log(ratio) - special.digamma(half) + np.log(half)
    excess = log_ratio.var(ddof=1) - special.polygamma(1, half).mean()
    prior_df = math.inf
    if excess > 0:
        prior_df = 2 * float(optimize.brentq(lambda x: float(special.polygamma(1, x)) - excess, 1e-8, 1e8))
    shift = 0.0 if math.isinf(prior_df) else float(special.digamma(prior_df / 2) - math.log(prior_df / 2))
    prior = math.exp(log_ratio.mean() + shift)
    pooled_df = df.sum()  # no more is known than was measured
    prior_df = min(prior_df, float(pooled_df))
    shared = (prior_df * prior * scales + df * variances) / (prior_df + df)
    return np.where(scales > 0, shared, variances), np.minimum(prior_df + df, pooled_df)


def _contrast(own: Items, random: Draws, scatter: float, draw_df: float) -> Contrast:
    """One contrast, not yet corrected for the others."""
    difference = own - random.mean(axis=0)
    value = float(difference.mean())
    item = float(difference.var(ddof=1)) / own.size
    draw = scatter * (1 + 1 / random.shape[0])
    total = item + draw
    if total == 0:
        return Contrast(value, value, value, float(value == 0), float(value == 0), float(own.size - 1))
    df = total**2 / (item**2 / (own.size - 1) + draw**2 / draw_df)
    half_width = float(stats.t.ppf(0.975, df)) * math.sqrt(total)
    p = float(2 * stats.t.sf(abs(value) / math.sqrt(total), df))
    return Contrast(value, value - half_width, value + half_width, p, p, df)


def matched_draws(kl: float, ladder: Sequence[tuple[Float[np.ndarray, " draw"], Draws]]) -> Draws | None:
    """What random subspaces that do the same damage would do to each item.

    Args:
        kl: The damage: mean KL from the base model, in nats.
        ladder: For each rank, the KL of every random draw and its change of every item. The base model itself, with
            neither, belongs to every ladder.

    Returns:
        For each draw its items' changes, interpolated in KL between two ranks; None where some draw never reached so
        large a KL.
    """
    n_draws, n_items = ladder[0][1].shape
    rows = []
    for draw in range(n_draws):
        rungs = sorted(((float(kls[draw]), changes[draw]) for kls, changes in ladder), key=lambda rung: rung[0])
        rungs.insert(0, (0.0, np.zeros(n_items)))
        above = next((i for i, rung in enumerate(rungs) if rung[0] >= kl), None)
        if above is None:
            return None
        (high_kl, high), (low_kl, low) = rungs[above], rungs[max(above - 1, 0)]
        weight = 0.0 if high_kl == low_kl else (kl - low_kl) / (high_kl - low_kl)
        rows.append(low + weight * (high - low))
    return np.stack(rows)
