"""Subspaces of the leading eigenvectors of any symmetric matrix, not only of a Gram matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.errors import SPDError
from spd_lens.estimators.base import Shape
from spd_lens.sites import Site
from spd_lens.subspaces import BlockSpectrum, GradientMoments, Subspace, resolve_rank, upright

Blocks = Float[Tensor, "block width width"]

NO_SPECTRUM: Mapping[str, str] = {
    "energy": "its directions have no singular values that add up to an energy; give a rank instead",
    "center_gradients": "a mean is taken off for singular vectors of gradients alone; leave it out",
}
"""`Estimator.lacks` of an estimator whose directions are no singular vectors."""


def leading(
    moments: GradientMoments, matrices: Mapping[Site, Blocks], known: Mapping[Site, Blocks], shape: Shape
) -> Subspace:
    """The orthonormal `V` with the largest `tr(Vᵀ M V)` per block (Ky Fan 1949): eigenvectors, largest value first.

    Args:
        moments: What the matrices were made from, for the model and the mean.
        matrices: `M`, symmetric, with eigenvalues of either sign.
        known: Gram matrices whose directions above rounding are those that `V` may be made of. Where a block has fewer
            of them than the rank asked for, the rank is capped.
        shape: Rank, blocks and centre.

    Raises:
        SPDError: no examples, a rank out of range, or a site without any known direction.
    """
    bases: dict[Site, list[Tensor]] = {}
    for site, matrix in matrices.items():
        within, bases[site] = BlockSpectrum.of(known[site]).leading(matrix.shape[-1], moments.dtype), []
        for block, own in zip(matrix, within, strict=True):
            vectors = own @ torch.linalg.eigh(own.T @ block @ own).eigenvectors.flip(-1)
            bases[site].append(upright(vectors[:, : resolve_rank(shape.rank, len(block))]))
    return subspace_of(bases, moments, shape)


def subspace_of(bases: Mapping[Site, list[Tensor]], moments: GradientMoments, shape: Shape, **origin: Any) -> Subspace:
    """The subspace of bases that were made from moments; `SPDError` where a site has no direction at all."""
    for site, blocks in bases.items():
        if not any(block.shape[1] for block in blocks):
            raise SPDError(f"the gradients at site {site} are all zero; the scored tokens do not depend on it")
    return Subspace.from_blocks(
        bases,
        offset={site: moments.mean(site, shape.per_head) for site in bases} if shape.center else {},
        rank=shape.rank,
        fingerprint=moments.fingerprint,
        origin={
            **moments.settings,
            **{name: int(getattr(moments, name).sum()) for name in ("n_examples", "n_tokens", "n_scored")},
            **origin,
        },
    )


def activation_blocks(moments: GradientMoments, site: Site, shape: Shape) -> Blocks:
    """`Σ xᵀx`, around the mean where the projection is: `Σ (x - μ)ᵀ(x - μ) = Σ xᵀx - n μᵀμ`."""
    blocks = moments.blocks(site, shape.per_head, of="activation")
    if shape.center:
        mean = moments.mean(site, shape.per_head)
        blocks = blocks - moments.n_tokens.sum() * mean[:, :, None] * mean[:, None, :]
    return blocks


def unit(gram: Blocks) -> Blocks:
    """Gram matrices with a trace of 1; those of nothing stay zero."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[:, None, None]
    return torch.where(trace > 0, gram / trace.clamp_min(torch.finfo(gram.dtype).tiny), 0.0)
