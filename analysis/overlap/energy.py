"""Do two subspaces hold each other's gradients? Between domains, losses, models of one shape, before and after.

The energy form leads: `tr(P_A C_B) / tr C_B`, the share of B's gradient energy that A's subspace holds. It is
asymmetric, defined for unequal ranks and weighs directions by what they carry; at half rank, angles mostly compare the
tails. Beside it stand chance (`rank / width`, exact for random subspaces) and a ceiling: what half of B's own examples
hold of the other half. All pairs are measured so, from half of the examples to half of the examples: they compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.analysis.common import (
    energy_by_rank,
    energy_share,
    filled,
    half_width,
    halves,
    p_value,
    place,
    random_bases,
    shard_grams,
    summed,
)
from spd_lens.analysis.overlap.angles_table import check_model, check_sites
from spd_lens.errors import SPDError
from spd_lens.subspaces import BlockSpectrum, GradientMoments, Rank, Subspace, resolve_rank

MAX_SHARD_RATIO = 1.5
"""Shards whose numbers of examples differ by more than this are not exchanged."""


def energy_overlap(
    domains: Mapping[str, GradientMoments],
    ranks: Sequence[Rank] = (1, 2, 4, 8, 16, 32),
    *,
    per_head: bool = True,
    shuffled: Mapping[str, GradientMoments] | None = None,
    any_model: bool = False,
    draws: int = 999,
    seed: int = 0,
) -> pd.DataFrame:
    """`tr(P_A C_B) / tr C_B` for every ordered pair of domains, each domain with itself included.

    Args:
        domains: Moments by name, each with examples in at least two shards; of one model, at the same sites.
        ranks: Ranks of the subspaces; those beyond a block's width are left out.
        per_head: A subspace per head, or one over all heads.
        shuffled: A null: by domain, moments of the same examples in the same shards with shuffled answers.
        any_model: Allow moments of two models of one shape, as in `compare_subspaces`.
        draws: Number of random subspaces for `p_random`.
        seed: Seed of the random subspaces, and of the choice of halves where there are many.

    Returns:
        Columns `site, layer, kind, head, of, a, b, rank, width, value, low, high, chance, full, p_random`. `value`:
        the subspace of half of A's shards, the energy of half of B's, mean over halves; for `a == b` the two halves
        are disjoint, which makes it the ceiling of B's column. `of` is `"domain"`, or says which null A is:
        `"shuffled"`, gradients of a domain's shuffled answers, or `"activations"`, the top directions of B's own
        activations (`a` is then `b`), which tell what any direction that the model uses much would hold; halves are
        disjoint too. `low` to `high`: 95 %, delete-half jackknife, for `a == b` an approximation. `full`: all of A's
        examples and all of B's (for `a == b` the same examples, so optimistic). `p_random`: how often a random
        subspace holds as much as `full`.
    """
    names = list(domains)
    moments = {name: filled(one) for name, one in domains.items()}
    first = moments[names[0]]
    for one in moments.values():
        _check_moments(first, one, any_model)
    rows: list[dict[str, Any]] = []
    wrong = {name: filled(one) for name, one in (shuffled or {}).items()}
    for name, one in wrong.items():
        if name not in moments or not torch.equal(one.n_examples, moments[name].n_examples):
            raise SPDError(f"the shuffled moments {name!r} are not of the same shards as a domain of that name")
    for site in first.sites:
        parts = {name: _Halves(shard_grams(one, site, per_head), one.dtype, seed) for name, one in moments.items()}
        used = {
            name: _Halves(shard_grams(one, site, per_head, "activation"), one.dtype, seed)
            for name, one in moments.items()
        }
        null = {name: _Halves(shard_grams(one, site, per_head), one.dtype, seed) for name, one in wrong.items()}
        width = parts[names[0]].whole.shape[-1]
        kept = sorted({resolve_rank(rank, width) for rank in ranks if isinstance(rank, float) or rank <= width})
        random = random_bases(draws, width, max(kept), seed)
        for b in names:
            by_chance = energy_by_rank(random[:, None], parts[b].whole)
            sources = [("domain", a, parts[a]) for a in names] + [("shuffled", a, one) for a, one in null.items()]
            for of, a, source in [*sources, ("activations", b, used[b])]:
                for block, held in source.shares_of(parts[b], by_chance, kept, same=a == b):
                    rows.append({**place(site, block, per_head), "of": of, "a": a, "b": b, **held})
    return pd.DataFrame(rows)


def permutation_test(
    a: GradientMoments,
    b: GradientMoments,
    rank: Rank = 0.125,
    *,
    per_head: bool = True,
    permutations: int = 199,
    seed: int = 0,
    any_model: bool = False,
) -> pd.DataFrame:
    """Do two domains draw from one pool? Their shards are exchanged, and the energy overlap computed again.

    The statistic is the mean of `tr(P_A C_B) / tr C_B` and `tr(P_B C_A) / tr C_A` from all examples: lower than among
    exchanged shards means that the domains differ. Shards are exchanged alike at all sites, so the row with the site
    `"all"`, the mean over sites and heads, is one test; the rows per site and head are not corrected for their number.

    Args:
        a: Moments with about as many examples per shard as `b`: otherwise shards are not exchangeable.
        b: The other domain's.
        rank: Rank of both subspaces.
        per_head: Subspaces per head, or joint.
        permutations: Number of random exchanges. The smallest possible p-value is `1 / (1 + permutations)`.
        seed: Seed of the exchanges.
        any_model: Allow moments of two models of one shape, as in `compare_subspaces`.

    Returns:
        Columns `site, layer, kind, head, rank, value, null, null_low, null_high, p_permutation`; `null` is the mean
        over exchanges with the range of 95 % of them. In the row `"all"`, `layer` is -1.
    """
    a, b = filled(a), filled(b)
    _check_moments(a, b, any_model)
    counts = torch.cat([a.n_examples, b.n_examples])
    if counts.max() > MAX_SHARD_RATIO * counts.min():
        raise SPDError(
            f"shards of {int(counts.min())} to {int(counts.max())} examples cannot be exchanged; extract both domains "
            "with as many examples per shard"
        )
    sides = _exchanges(a.n_shards, b.n_shards, permutations, seed)
    found: list[tuple[dict[str, Any], Tensor]] = []
    for site in a.sites:
        pool = torch.cat([shard_grams(a, site, per_head), shard_grams(b, site, per_head)])
        k = resolve_rank(rank, pool.shape[-1])
        first, second = summed(sides, pool), summed(1 - sides, pool)
        both = [BlockSpectrum.of(gram).known(a.dtype)[1][..., :k] for gram in (first, second)]
        cross = (energy_share(both[0], second) + energy_share(both[1], first)) / 2
        for block in range(cross.shape[1]):
            if bool(torch.isfinite(cross[:, block]).all()):
                found.append(({**place(site, block, per_head), "rank": k}, cross[:, block]))
    everywhere = {"site": "all", "layer": -1, "kind": "all", "head": "all", "rank": found[0][0]["rank"]}
    found.append((everywhere, torch.stack([values for _, values in found]).mean(dim=0)))
    rows = []
    for where, values in found:
        null = values[1:]
        low, high = np.quantile(null.numpy(), [0.025, 0.975])
        rows.append(
            {**where, "value": float(values[0]), "null": float(null.mean()), "null_low": float(low),
             "null_high": float(high), "p_permutation": p_value(float(values[0]), null, smaller=True)}
        )  # fmt: skip
    return pd.DataFrame(rows)


def held_by(subspace: Subspace, moments: GradientMoments) -> pd.DataFrame:
    """Share of the moments' energy that this very subspace holds, per site and head.

    Returns:
        Columns `site, layer, kind, head, rank, width, value, low, high, chance`; the interval, over shards, is about
        the moments: the subspace is taken as it is.
    """
    moments = filled(moments)
    check_sites("the subspace", subspace.sites, "the moments", moments.sites)
    rows: list[dict[str, Any]] = []
    for site in subspace.sites:
        shards = shard_grams(moments, site, subspace.per_head)
        basis = subspace.bases[site]
        if shards.shape[1:3] != basis.shape[:2]:
            raise SPDError(
                f"at site {site} the subspace has {basis.shape[0]} blocks of width {basis.shape[1]} and the moments "
                f"{shards.shape[1]} of {shards.shape[2]}; they are of different models"
            )
        whole = energy_share(basis, shards.sum(dim=0))
        spread = half_width(energy_share(basis, summed(halves(moments.n_shards), shards)), moments.n_shards)
        for block, rank in enumerate(subspace.ranks[site]):
            value, error = float(whole[block]), float(spread[block])
            if np.isfinite(value):
                rows.append(
                    {**place(site, block, subspace.per_head), "rank": rank, "width": basis.shape[1], "value": value,
                     "low": max(0.0, value - error), "high": min(1.0, value + error), "chance": rank / basis.shape[1]}
                )  # fmt: skip
    return pd.DataFrame(rows)


class _Halves:
    """One domain at one site: its directions and its energy, whole and on every half of the shards."""

    def __init__(self, shards: Float[Tensor, "shard block width width"], dtype: str, seed: int) -> None:
        self.n_shards = len(shards)
        weights = halves(self.n_shards, seed)
        self.whole = shards.sum(dim=0)
        self._held = summed(weights, shards)
        self._others = summed(1 - weights, shards)
        self._directions, self._all_directions = (
            BlockSpectrum.of(gram).known(dtype)[1] for gram in (self._held, self.whole)
        )

    def energy_of(
        self, other: _Halves, *, same: bool
    ) -> tuple[Float[Tensor, "half block rank"], Float[Tensor, "block rank"]]:
        """What directions from halves of this hold of halves of the other's energy, by rank; and whole of whole.

        `same`: both are of the same examples, so the other's complementary halves are taken.
        """
        if same:
            energies = other._others
        else:
            # another half of the other domain beside each half of this one, in a fixed order
            order = torch.randperm(len(other._held), generator=torch.Generator().manual_seed(0))
            energies = other._held[order]
        n = min(len(self._directions), len(energies))
        return energy_by_rank(self._directions[:n], energies[:n]), energy_by_rank(self._all_directions, other.whole)

    def shares_of(
        self, other: _Halves, by_chance: Float[Tensor, "draw block rank"], ranks: Sequence[int], *, same: bool
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """`energy_of` at some ranks with its interval, for the blocks with gradients in both domains."""
        at_halves, full = self.energy_of(other, same=same)
        spread = half_width(at_halves, min(self.n_shards, other.n_shards))
        width = self.whole.shape[-1]
        for block in range(full.shape[0]):
            if bool(torch.isfinite(at_halves[:, block]).all()):
                for rank in ranks:
                    at = (block, rank - 1)
                    value, error, held = float(at_halves[:, *at].mean()), float(spread[at]), float(full[at])
                    yield block, {
                        "rank": rank, "width": width, "value": value, "low": max(0.0, value - error),
                        "high": min(1.0, value + error), "chance": rank / width, "full": held,
                        "p_random": p_value(held, by_chance[:, *at]),
                    }  # fmt: skip


def _exchanges(n_a: int, n_b: int, permutations: int, seed: int) -> Float[Tensor, "set shard"]:
    """Sets of the pooled shards that count as A's: first its own, then random ones."""
    if permutations < 19:
        raise SPDError(f"{permutations} permutations cannot give a p-value of 0.05; give at least 19")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(permutations + 1, n_a + n_b, dtype=torch.float64)
    rows[0, :n_a] = 1
    for row in rows[1:]:
        row[torch.randperm(n_a + n_b, generator=generator)[:n_a]] = 1
    return rows


def _check_moments(a: GradientMoments, b: GradientMoments, any_model: bool) -> None:
    check_sites("the first moments", a.sites, "the second", b.sites)
    for site in a.sites:
        mine, theirs = (one.gradient[site].shape[-1] for one in (a, b))
        if mine != theirs or a.n_heads[site] != b.n_heads[site]:
            raise SPDError(
                f"at site {site} the moments have {a.n_heads[site]} heads, width {mine}, and {b.n_heads[site]} heads, "
                f"width {theirs}; only moments of one shape compare"
            )
    if not any_model:
        check_model(a, b)
