"""Everything in the dashboard that depends on the rank, for all ranks at once, from moments alone.

With `V` the eigenvectors of one block's Gram matrix, leading first, the energy that the top `r` of them hold of any
other Gram matrix `C` is `tr(V_rᵀ C V_r)`: the running sum of the diagonal of `Vᵀ C V`. So one rotation serves every
rank, and moving the slider computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.analysis.common import energy_by_rank, filled, half_width, sets, shard_grams, summed
from spd_lens.sites import Site
from spd_lens.subspaces import GradientMoments, Subspace, energies_of

Vectors = Float[Tensor, "block width rank"]
Gram = Float[Tensor, "block width width"]
Curve = Float[Tensor, "block rank"]


@dataclass(frozen=True)
class Source:
    """What a view draws from: a run's moments, or a subspace alone, which knows its spectrum but no Gram matrix."""

    name: str
    moments: GradientMoments | None = None
    subspace: Subspace | None = None

    def directions(self) -> Iterator[tuple[Site, bool, SiteDirections]]:
        """Every site's directions per head (True) and joint (False), where there are both; one block is joint."""
        if self.moments is not None:
            views = (True, False) if self.moments.across_heads else (True,)
            for site in self.moments.sites:
                for per_head in views if self.moments.n_heads[site] > 1 else (False,):
                    yield site, per_head, SiteDirections.of(self.moments, site, per_head)
        elif self.subspace is not None:
            for site in self.subspace.sites:
                basis, values = self.subspace.bases[site], self.subspace.singular_values.get(site)
                yield site, len(basis) > 1, SiteDirections(basis, None if values is None else values.square())


@dataclass(frozen=True)
class SiteDirections:
    """One site's directions, leading first, and the Gram matrices they belong to, where known."""

    vectors: Vectors
    """Orthonormal columns; as many as a block is wide if they come from moments."""
    energies: Float[Tensor, "block width"] | None = None
    """Squared singular values of the stacked gradients, descending."""
    gradient: Gram | None = None
    activation: Gram | None = None

    @classmethod
    def of(cls, moments: GradientMoments, site: Site, per_head: bool) -> SiteDirections:
        own = moments.spectrum(site, per_head)
        return cls(own.vectors, own.energies, own.gram, moments.blocks(site, per_head, of="activation"))

    @property
    def n_blocks(self) -> int:
        return self.vectors.shape[0]

    @property
    def width(self) -> int:
        return self.vectors.shape[1]

    @cached_property
    def cumulative(self) -> Curve | None:
        """Share of the gradient energy in the leading `r` directions, for `r = 1, ..., width`."""
        return None if self.energies is None else shares(self.energies)

    def held(self, gram: Gram | None) -> Curve | None:
        """`tr(P_r C) / tr C` for every rank: the share of another Gram matrix's energy that these directions hold."""
        # a block without any energy has shares of 0, not of NaN
        return None if gram is None else energy_by_rank(self.vectors, gram).nan_to_num()


def shares(energies: Float[Tensor, "block width"]) -> Curve:
    """Running share of a descending spectrum's total; zeros where there is no energy at all."""
    return (energies.cumsum(-1) / energies.sum(-1, keepdim=True)).clamp(0, 1).nan_to_num()


def split_half(moments: GradientMoments, site: Site, per_head: bool) -> Curve | None:
    """How much the directions of one half of the examples hold of the other half's gradients, as a mean of both ways.

    It is the ceiling for any overlap between domains, and free of the optimism of `SiteDirections.cumulative`, whose
    directions were chosen on the energy that they are measured on. None if the moments have one shard, or
    examples in one half alone.
    """
    if moments.n_shards < 2:
        return None
    halves = moments.halves()
    if not all(int(half.n_examples.sum()) for half in halves):
        return None
    one, two = (SiteDirections.of(half, site, per_head) for half in halves)
    across, back = one.held(two.gradient), two.held(one.gradient)
    assert across is not None and back is not None
    return (across + back) / 2


def jackknife_band(moments: GradientMoments, site: Site, per_head: bool) -> tuple[Curve, Curve] | None:
    """95 % band of the cumulative energy: the delete-half jackknife over shards of examples.

    None if fewer than three shards hold examples.
    """
    if int((moments.n_examples > 0).sum()) < 3:
        return None
    moments = filled(moments)
    grams = shard_grams(moments, site, per_head)
    # one set after the other: all of their Gram matrices at once take gigabytes where heads are many
    value, *at_halves = (shares(energies_of(summed(chosen, grams))) for chosen in sets(moments.n_shards))
    reach = half_width(torch.stack(at_halves), moments.n_shards)
    return (value - reach).clamp(0, 1), (value + reach).clamp(0, 1)
