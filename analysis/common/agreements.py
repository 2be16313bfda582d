"""How far a subspace agrees with the gradients of other examples, in three measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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
        grams = held_out.blocks(site, subspace.per_head)
        for block, (a, b, gram) in enumerate(zip(subspace.blocks(site), other.blocks(site), grams, strict=True)):
            if not a.shape[1] or not b.shape[1]:
                continue  # no gradient at this head, so nothing to compare
            where = {**place(site, block, subspace.per_head), **labels}
            values = energy_share(a, gram), mean_squared_cosine(a, b), principal_angles(a, b).rad2deg().mean()
            for measure, value in zip(MEASURES, values, strict=True):
                yield {**where, "measure": measure, "value": value.item()}
