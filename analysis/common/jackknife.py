"""Intervals from the shards of moments: the delete-half jackknife, with the Gram matrices of sets of shards.

Every statistic is computed again on each half of the shards (all halves if there are few, else a random choice). The
spread over halves without repetition estimates the standard error on the whole set without any factor (delete-d
jackknife with d = n/2; Shao and Wu 1989), also for statistics that are not smooth, such as a rank. A bootstrap would
draw shards twice: a set with duplicates spans fewer directions, so that effective ranks come out too low and the band
lies below its own value. Halves have such a bias too, but one that can be read: what the statistic is with half as many
examples. It is reported as `at_half`, and the interval stays around the value of the whole set.

What shards resolve: `n` shards give an interval with n - 1 degrees of freedom (Student's t), 7 for the default of 8
shards, and treat the examples within a shard as one draw. Moments of one shard have no interval.
"""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from spd_lens.errors import SPDError
from spd_lens.sites import Site
from spd_lens.subspaces import GradientMoments

MAX_HALVES = 128
"""Where there are more halves than this, as many are drawn at random; 8 shards have 70."""


def filled(moments: GradientMoments) -> GradientMoments:
    """The moments without the shards that hold no example; `SPDError` if fewer than two are left."""
    chosen = [i for i, n in enumerate(moments.n_examples.tolist()) if n]
    if len(chosen) < 2:
        raise SPDError(
            f"intervals need examples in at least two shards, and these moments have them in {len(chosen)}; extract "
            "with shards=8"
        )
    return moments if len(chosen) == moments.n_shards else moments.shards(chosen)


def halves(n_shards: int, seed: int = 0) -> Float[Tensor, "half shard"]:
    """One row per half: 1 for each of its `n_shards // 2` shards, else 0."""
    size = n_shards // 2
    if math.comb(n_shards, size) <= MAX_HALVES:
        chosen = list(itertools.combinations(range(n_shards), size))
    else:
        generator = torch.Generator().manual_seed(seed)
        chosen = [tuple(torch.randperm(n_shards, generator=generator)[:size].tolist()) for _ in range(MAX_HALVES)]
    rows = torch.zeros(len(chosen), n_shards, dtype=torch.float64)
    for row, half in zip(rows, chosen, strict=True):
        row[list(half)] = 1
    return rows


def half_width(at_halves: Float[Tensor, "half ..."], n_shards: int) -> Float[Tensor, "..."]:
    """Half the width of the 95 % interval around a statistic of all shards, from its values on halves of them."""
    kept = n_shards // 2
    variance = at_halves.var(dim=0, correction=0) * kept / (n_shards - kept)
    return variance.sqrt() * float(stats.t.ppf(0.975, n_shards - 1))


def around(value: Tensor, spread: Tensor, lowest: float = 0.0, highest: float = 1.0) -> dict[str, float]:
    """A row's columns `value, low, high`, with the interval kept inside what the measure can be."""
    middle, reach = value.item(), spread.item()
    return {"value": middle, "low": max(lowest, middle - reach), "high": min(highest, middle + reach)}


def shard_grams(
    moments: GradientMoments, site: Site, per_head: bool, of: str = "gradient"
) -> Float[Tensor, "shard block width width"]:
    """`Σ gᵀg` or `Σ xᵀx` of each shard, per head or as one joint block; their sum is `moments.blocks(...)`."""
    return moments.grams(site, per_head, of=of)


def summed(weights: Float[Tensor, "set shard"], shards: Float[Tensor, "shard ..."]) -> Float[Tensor, "set ..."]:
    """Sums over the shards of each set."""
    return torch.tensordot(weights, shards, dims=1)


def sets(n_shards: int, seed: int = 0) -> Float[Tensor, "set shard"]:
    """All shards as the first row, then every half."""
    return torch.cat([torch.ones(1, n_shards, dtype=torch.float64), halves(n_shards, seed)])
