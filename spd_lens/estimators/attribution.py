"""What the loss is better off without, to first order."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.estimators.base import Estimator, Shape, Source
from spd_lens.estimators.directions import NO_SPECTRUM, activation_blocks, leading, unit
from spd_lens.estimators.registry import register
from spd_lens.models import neutral
from spd_lens.sites import Site
from spd_lens.subspaces import GradientMoments, Subspace, diagonal_blocks


@register
class Attribution(Estimator):
    """Removes the directions whose removal lowers the loss most, and keeps the rest.

    Without the unit direction `v`, an activation `x` is `x - x v vᵀ`, which changes the loss by `-vᵀ A v` to first
    order, where `A = (Σ gᵀx + xᵀg) / 2` over all tokens (gradient times input: Sundararajan et al. 2017, section 2).
    For orthonormal directions these changes add up, so the lowest eigenvalues of `A` are what to keep. Around the mean
    it is `x - μ` that is taken away.
    """

    name = "attribution"
    says = "all but the directions whose removal lowers the loss most, to first order"
    needs = {"keep": ("cross",)}
    lacks = NO_SPECTRUM

    def gain(self, source: Source, site: Site, shape: Shape) -> Float[Tensor, "block width width"]:
        """`A` per example: `vᵀ A v` is by how many nats the mean loss falls when `v` is removed."""
        return _attribution(moments := self.moments(source), moments, site, shape)

    @neutral()
    def estimate(self, source: Source, shape: Shape) -> Subspace:
        moments = self.moments(source)
        known = {}
        for site in moments.sites:
            gradient = moments.blocks(site, shape.per_head)
            reached = gradient.any(dim=-1).any(dim=-1)[:, None, None]  # of a head without any gradient nothing is known
            known[site] = (unit(gradient) + unit(activation_blocks(moments, site, shape))) * reached
        return leading(moments, {site: -self.gain(source, site, shape) for site in known}, known, shape)


@register
class AttributionContrast(Attribution):
    """Removes what lowers the loss of the right answers more than that of shuffled ones."""

    name = "attribution-contrast"
    says = "all but the directions whose removal favours right answers over shuffled ones most, to first order"

    def gain(self, source: Source, site: Site, shape: Shape) -> Float[Tensor, "block width width"]:
        wrong = _attribution(self.moments(source, shuffled=True), self.moments(source), site, shape)
        return super().gain(source, site, shape) - wrong


def _attribution(
    moments: GradientMoments, around: GradientMoments, site: Site, shape: Shape
) -> Float[Tensor, "block width width"]:
    """`A` per example; `around` has the mean `μ` that the projection leaves in place."""
    found = moments.attribution(site, shape.per_head)
    if shape.center:  # Σ gᵀ(x - μ) = Σ gᵀx - (Σ g)ᵀ μ
        total, mean = moments.gradient_sum[site].sum(dim=0), around.mean(site, per_head=False)[0]
        found = found - diagonal_blocks(torch.outer(total, mean), len(found))
    return found / moments.n_examples.sum()
