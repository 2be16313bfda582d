"""Do two subspaces hold each other's gradients? Between domains, losses, models of one shape, before and after.

The energy form leads: `tr(P_A C_B) / tr C_B`, the share of B's gradient energy that A's subspace holds. It is
asymmetric, defined for unequal ranks and weighs directions by what they carry; at half rank, angles mostly compare the
tails. Beside it stand chance (`rank / width`, exact for random subspaces) and a ceiling: what half of B's own examples
hold of the other half. All pairs are measured so, from half of the examples to half of the examples: they compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.analysis.common import (
    around,
    beside_null,
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
        parts, used, null = (
            {name: _Halves(shard_grams(one, site, per_head, what), one.dtype, seed) for name, one in of.items()}
            for of, what in ((moments, "gradient"), (moments, "activation"), (wrong, "gradient"))
        )
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
        b: Moments of the other domain.
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
        rows.append({**where, **beside_null(float(values[0]), values[1:], smaller=True)})
    return pd.DataFrame(rows).rename(columns={"p": "p_permutation"})


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
            if torch.isfinite(whole[block]):
                rows.append(
                    {**place(site, block, subspace.per_head), "rank": rank, "width": basis.shape[1],
                     **around(whole[block], spread[block]), "chance": rank / basis.shape[1]}
                )  # fmt: skip
    return pd.DataFrame(rows)


class _Halves:
    """One domain at one site: its directions and its energy, whole and on every half of the shards."""

    def __init__(self, shards: Float[Tensor, "shard block width width"], dtype: str, seed: int) -> None:
        self.n_shards = len(shards)
        weights = halves(self.n_shards, seed)
        self.whole = shards.sum(dim=0)
        self.held = summed(weights, shards)
        self.others = summed(1 - weights, shards)
        self.directions, self.all_directions = (
            BlockSpectrum.of(gram).known(dtype)[1] for gram in (self.held, self.whole)
        )

    def shares_of(
        self, other: _Halves, by_chance: Float[Tensor, "draw block rank"], ranks: Sequence[int], *, same: bool
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """What this domain's directions hold of the other's energy at some ranks, for blocks with gradients in both.

        Where both are of the `same` examples, the other's complementary halves are taken.
        """
        energies = other.others
        if not same:  # another half of the other domain beside each half of this one, in a fixed order
            energies = other.held[torch.randperm(len(other.held), generator=torch.Generator().manual_seed(0))]
        n = min(len(self.directions), len(energies))
        at_halves = energy_by_rank(self.directions[:n], energies[:n])
        full = energy_by_rank(self.all_directions, other.whole)
        spread = half_width(at_halves, min(self.n_shards, other.n_shards))
        width = self.whole.shape[-1]
        for block in range(full.shape[0]):
            if bool(torch.isfinite(at_halves[:, block]).all()):
                for rank in ranks:
                    at = (block, rank - 1)
                    held = float(full[at])
                    yield block, {
                        "rank": rank, "width": width, **around(at_halves[:, *at].mean(), spread[at]),
                        "chance": rank / width, "full": held, "p_random": p_value(held, by_chance[:, *at]),
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
        mine, theirs = (one.width(site) for one in (a, b))
        if mine != theirs or a.n_heads[site] != b.n_heads[site]:
            raise SPDError(
                f"at site {site} the moments have {a.n_heads[site]} heads, width {mine}, and {b.n_heads[site]} heads, "
                f"width {theirs}; only moments of one shape compare"
            )
    if not any_model:
        check_model(a, b)
