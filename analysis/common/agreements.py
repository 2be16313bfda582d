"""How far a subspace agrees with the gradients of other examples, in three measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from spd_lens.analysis.common.angles import energy_share, mean_squared_cosine, principal_angles
from spd_lens.analysis.common.subject import place
from spd_lens.subspaces import GradientMoments, Rank, Subspace

ENERGY = "energy share"
MEASURES = (ENERGY, "mean squared cosine", "mean angle")


def agreement(
    subspace: Subspace, held_out: GradientMoments, rank: Rank, labels: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """A row per site, head and measure: `subspace` against the gradients of `held_out` and their own subspace."""
    other = held_out.subspace(rank, per_head=subspace.per_head, sites=subspace.sites)
    for site in subspace.sites:
        energy = held_out.blocks(site, subspace.per_head)
        for block, gram in enumerate(energy):
            a = subspace.bases[site][block, :, : subspace.ranks[site][block]]
            b = other.bases[site][block, :, : other.ranks[site][block]]
            if not a.shape[1] or not b.shape[1]:
                continue  # no gradient at this head, so nothing to compare
            where = {**place(site, block, subspace.per_head), **labels}
            for measure, value in zip(MEASURES, _measures(a, b, gram), strict=True):
                yield {**where, "measure": measure, "value": value}


def _measures(
    a: Float[Tensor, "width rank_a"], b: Float[Tensor, "width rank_b"], gram: Float[Tensor, "width width"]
) -> tuple[float, float, float]:
    """Energy share, mean squared cosine and mean principal angle in degrees."""
    angles = principal_angles(a, b).rad2deg()
    return energy_share(a, gram).item(), mean_squared_cosine(a, b).item(), angles.mean().item()
