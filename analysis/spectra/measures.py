"""How low-rank are the gradients? Spectra per site and head, beside those of activations and of wrong answers.

Leads with low ranks: how many of a block's directions hold 90 % of the gradients' energy `‖G‖²_F`. Two nulls stand
beside it: the spectrum of the activations, which are low-rank for reasons of their own, and that of gradients of
shuffled answers (same prompts and formats). Intervals come from the delete-half jackknife over shards (`jackknife`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from spd_lens.analysis.common import (
    around,
    energy_by_rank,
    entropy_rank,
    filled,
    half_width,
    participation_ratio,
    place,
    random_bases,
    sets,
    shard_grams,
    stable_rank,
    summed,
)
from spd_lens.errors import SPDError
from spd_lens.sites import Site
from spd_lens.stats import Estimate
from spd_lens.subspaces import BlockSpectrum, GradientMoments, rank_holding

GRADIENTS, SHUFFLED = "gradients", "gradients of shuffled answers"
ACTIVATIONS, CENTRED = "activations", "activations, centred"
SOURCES = (GRADIENTS, SHUFFLED, ACTIVATIONS, CENTRED)
NULLS = SOURCES[1:]

ENERGY, HELD_OUT, SINGULAR = "energy share", "energy share, held out", "singular value"
RANKS: dict[str, Callable[[Tensor], Tensor]] = {
    "rank of 90 % energy": lambda energies: rank_holding(energies, 0.90).double(),
    "rank of 99 % energy": lambda energies: rank_holding(energies, 0.99).double(),
    "participation ratio": participation_ratio,
    "entropy rank": entropy_rank,
    "stable rank": stable_rank,
}
"""Effective ranks, all of the energies `σ²` and all between 1 and the width."""


def spectrum(moments: GradientMoments, *, per_head: bool = True, source: str = GRADIENTS) -> pd.DataFrame:
    """Singular values and cumulative energy against rank.

    Args:
        moments: Moments with examples in at least two shards.
        per_head: Whether to take a spectrum per head, or one over all heads.
        source: What is decomposed, one of `SOURCES`; it labels the rows. For shuffled answers give their moments.

    Returns:
        Columns `site, layer, kind, head, source, measure, rank, width, value, low, high`. Measures: `"singular value"`
        number `rank`; `"energy share"` of the leading `rank` directions, which is optimal for the examples it is
        measured on; `"energy share, held out"`: directions from half of the shards, energy of the other half, mean over
        halves. Ends where rounding of the gradients begins.
    """
    moments = filled(moments)
    weights, n = sets(moments.n_shards), moments.n_shards
    rows: list[dict[str, Any]] = []
    for site in moments.sites:
        energies, vectors = _known(moments, site, per_head, source, weights)
        share = energies.cumsum(-1) / energies.sum(-1, keepdim=True)
        held = energy_by_rank(vectors[1:], _grams(moments, site, per_head, source, 1 - weights[1:]))
        # a half's energies are brought to the size of the whole
        values = (energies * (n / weights.sum(-1))[:, None, None]).sqrt()
        measures = (
            (SINGULAR, values[0], values[1:], math.inf), (ENERGY, share[0], share[1:], 1.0),
            (HELD_OUT, held.mean(0), held, 1.0),
        )  # fmt: skip
        for block, (name, value, at_halves, highest) in product(range(len(share[0])), measures):
            known = int((energies[0, block] > 0).sum())  # none where nothing flows into this head
            where = {**place(site, block, per_head), "source": source, "measure": name}
            rows += _curve(where, value[block, :known], half_width(at_halves[:, block], n), highest)
    return pd.DataFrame(rows)


def effective_ranks(moments: GradientMoments, *, per_head: bool = True, source: str = GRADIENTS) -> pd.DataFrame:
    """Effective ranks per site and head: `RANKS`. Arguments as in `spectrum`.

    Returns:
        Columns `site, layer, kind, head, source, measure, width, value, low, high, at_half`. `at_half` is the mean over
        halves of the shards: where it is clearly below `value`, more examples would raise the value further.
    """
    moments = filled(moments)
    weights, n = sets(moments.n_shards), moments.n_shards
    rows: list[dict[str, Any]] = []
    for site in moments.sites:
        energies, _ = _known(moments, site, per_head, source, weights)
        for block in range(energies.shape[1]):
            here = energies[:, block]
            if not here[0].any():
                continue
            for name, measure in RANKS.items():
                values, width = measure(here[here.sum(-1) > 0]), here.shape[-1]
                rows.append(
                    {**place(site, block, per_head), "source": source, "measure": name, "width": width,
                     **around(values[0], half_width(values[1:], n), 1.0, width),
                     "at_half": float(values[1:].mean())}
                )  # fmt: skip
    return pd.DataFrame(rows)


def activation_kept(
    moments: GradientMoments, *, per_head: bool = True, draws: int = 200, seed: int = 0
) -> pd.DataFrame:
    """Share of the *activations'* energy that the gradient subspace of each rank keeps: what a projection leaves.

    Args:
        moments: Moments with examples in at least two shards.
        per_head: Whether to take a subspace per head, or one over all heads.
        draws: Number of random subspaces for the null's range.
        seed: Seed of the random subspaces.

    Returns:
        Columns `site, layer, kind, head, part, rank, width, value, low, high, chance, random_low, random_high`. Parts:
        the `"mean"` activation over tokens (`μᵀPμ / μᵀμ`), the `"rest"` around it, and `"all"`. `chance` is
        `rank / width`, exact for uniformly random subspaces; `random_low` to `random_high` holds 95 % of them (for the
        mean exactly, a Beta distribution; otherwise by drawing).
    """
    moments = filled(moments)
    weights, n = sets(moments.n_shards), moments.n_shards
    rows: list[dict[str, Any]] = []
    for site in moments.sites:
        _, vectors = _known(moments, site, per_head, GRADIENTS, weights)
        full = _grams(moments, site, per_head, ACTIVATIONS, weights)
        mean = _means(moments, site, weights, full.shape[1])
        width = full.shape[-1]
        chance = torch.arange(1, width + 1, dtype=torch.float64) / width
        random, ends = random_bases(draws, width, width, seed), torch.tensor([0.025, 0.975]).double()
        for (part, grams), block in product(
            {"all": full, "mean": mean, "rest": full - mean}.items(), range(full.shape[1])
        ):
            kept = energy_by_rank(vectors[:, block], grams[:, block])
            known = int(vectors[0, block].any(dim=0).sum())
            if part == "mean":
                low, high = _beta_range(width)
            else:
                low, high = torch.quantile(energy_by_rank(random, grams[0, block]), ends, dim=0)
            null = {"chance": chance, "random_low": low, "random_high": high}
            where = {**place(site, block, per_head), "part": part}
            rows += _curve(where, kept[0, :known], half_width(kept[1:], n), 1.0, **null)
    return pd.DataFrame(rows)


def rank_difference(
    moments: GradientMoments, other: GradientMoments, measure: str = "entropy rank", *, per_head: bool = True
) -> Estimate:
    """Mean over sites and heads of an effective rank of `moments` minus that of `other`, paired shard by shard.

    For gradients of the same examples with right and with shuffled answers, in the same order, so that what a shard's
    prompts have in common cancels. Interval: delete-half jackknife, 95 %.
    """
    if moments.sites != other.sites or not torch.equal(moments.n_examples, other.n_examples):
        raise SPDError("the two moments are not of the same sites and shards, so their shards cannot be paired")
    moments, other = filled(moments), filled(other)
    weights = sets(moments.n_shards)
    differences = []
    for site in moments.sites:
        mine, theirs = (_known(one, site, per_head, GRADIENTS, weights)[0] for one in (moments, other))
        differences.append(RANKS[measure](mine) - RANKS[measure](theirs))
    mean = torch.cat(differences, dim=1).nanmean(dim=1)  # a head without gradients has no rank
    interval = around(mean[0], half_width(mean[1:], moments.n_shards), -math.inf, math.inf)
    return Estimate(**interval, n=moments.n_shards, method="paired delete-half jackknife over shards, 95%")


def widths(rows: pd.DataFrame) -> str:
    """The widths of the blocks in a table, such as `64` or `64/192`."""
    return "/".join(str(width) for width in sorted(set(rows.width)))


def headline(ranks: pd.DataFrame) -> str:
    """How many directions hold 90 % of the energy, over sites and heads, and in the nulls."""
    chosen = ranks[ranks.measure == "rank of 90 % energy"]
    parts = []
    for source in SOURCES:
        mine = chosen[chosen.source == source]
        if mine.empty:
            continue
        low, middle, high = (mine.value.quantile(q) for q in (0, 0.5, 1))
        span = f"{low:.0f} to {high:.0f}" if low < high else f"{low:.0f}"
        parts.append(f"{source}: {span} of {widths(mine)} directions (median {middle:g})")
    mine = ranks[(ranks.source == GRADIENTS) & (ranks.measure == "entropy rank")]
    growth = (mine.at_half / mine.value).median()
    text = f"90 % of the energy sits in, over sites and heads: {'; '.join(parts)}."
    if growth < 0.97:
        text += f" Half of the examples give {growth:.0%} of the gradients' entropy rank (median), "
        text += "so more would give a higher one."
    return text


def _known(
    moments: GradientMoments, site: Site, per_head: bool, source: str, weights: Float[Tensor, "set shard"]
) -> tuple[Float[Tensor, "set block width"], Float[Tensor, "set block width width"]]:
    """Energies and directions of each set of shards, with zeros where rounding begins."""
    return BlockSpectrum.of(_grams(moments, site, per_head, source, weights)).known(moments.dtype)


def _grams(
    moments: GradientMoments, site: Site, per_head: bool, source: str, weights: Float[Tensor, "set shard"]
) -> Float[Tensor, "set block width width"]:
    if source not in SOURCES:
        raise SPDError(f"unknown source {source!r}; choose from {'; '.join(SOURCES)}")
    if source in (GRADIENTS, SHUFFLED):
        return summed(weights, shard_grams(moments, site, per_head))
    grams = summed(weights, shard_grams(moments, site, per_head, "activation"))
    if source == CENTRED:
        grams = grams - _means(moments, site, weights, grams.shape[1])
    return grams


def _means(
    moments: GradientMoments, site: Site, weights: Float[Tensor, "set shard"], n_blocks: int
) -> Float[Tensor, "set block width width"]:
    """The part of each set's activation Gram matrix that its mean activation alone makes: `n μᵀμ`."""
    sums = summed(weights, moments.activation_sum[site]).view(len(weights), n_blocks, -1)
    tokens = (weights @ moments.n_tokens.double())[:, None, None, None]
    return sums[..., :, None] * sums[..., None, :] / tokens


def _curve(
    where: dict[str, Any],
    values: Float[Tensor, " known"],
    spread: Float[Tensor, " width"],
    highest: float,
    **others: Float[Tensor, " width"],
) -> Iterator[dict[str, Any]]:
    """One row per rank, with the interval around each value and what other curves have at that rank."""
    for i, value in enumerate(values):
        row = {**where, "rank": i + 1, "width": len(spread), **around(value, spread[i], highest=highest)}
        yield row | {name: float(other[i]) for name, other in others.items()}


def _beta_range(width: int) -> Float[Tensor, "end rank"]:
    """Where a random subspace's share of one direction lies: Beta(rank / 2, (width - rank) / 2)."""
    ranks = torch.arange(1, width)
    ends = [stats.beta.ppf(q, ranks / 2, (width - ranks) / 2) for q in (0.025, 0.975)]
    return torch.tensor([[*end, 1.0] for end in ends], dtype=torch.float64)
