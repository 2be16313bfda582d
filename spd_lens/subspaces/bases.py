"""Linear algebra on the directions of one block: a basis is `[width, rank]`, with orthonormal columns, float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.errors import SPDError

Basis = Float[Tensor, "width rank"]

_ORTHONORMAL = 1e-6
"""How far from orthonormal a basis may be, in any product of two of its columns."""
TOLERANCE = 1e-6
"""Radians. Two directions that are closer count as one; extraction in float64 leaves angles of about 1e-8."""


def span(directions: Float[Tensor, "width n"], tolerance: float = TOLERANCE) -> Basis:
    """Basis of the span of unit vectors, of which two that are closer than `tolerance` count as one.

    Two unit vectors at an angle θ have the singular values `√2 cos(θ/2)` and `√2 sin(θ/2)`.
    """
    left, values, _ = torch.linalg.svd(directions, full_matrices=False)
    return left[:, values > 2**0.5 * math.sin(tolerance / 2)]


def shared(a: Basis, b: Float[Tensor, "width other"], tolerance: float = TOLERANCE) -> Float[Tensor, "width both"]:
    """Bisectors of the principal vectors of `a` and `b` that are within `tolerance` radians of each other."""
    left, _, right = torch.linalg.svd(a.T @ b, full_matrices=False)
    u, v = a @ left, b @ right.mT  # principal vectors, in pairs; of different pairs orthogonal
    # From the chord and not from the cosine, which cannot tell angles below 1e-8 from 0.
    angle = 2 * torch.asin(((u - v).norm(dim=0) / 2).clamp(max=1.0))
    both = (u + v)[:, angle <= tolerance]
    return both / both.norm(dim=0, keepdim=True)


def upright(basis: Basis) -> Basis:
    """Directions are defined up to sign: each one's largest entry made positive, so that files compare."""
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0)


def rest(basis: Basis) -> Float[Tensor, "width other"]:
    """Basis of what is orthogonal to all of `basis`."""
    # the complete factorisation appends an orthonormal basis of the rest
    return torch.linalg.qr(basis, mode="complete").Q[:, basis.shape[1] :]


def random_basis(width: int, rank: int, generator: torch.Generator, *n: int) -> Float[Tensor, "*n width rank"]:
    """Basis of a uniformly random subspace, or of `n` of them: Q of a Gaussian matrix is Haar up to signs."""
    return torch.linalg.qr(torch.randn(*n, width, rank, generator=generator, dtype=torch.float64)).Q


def squared_cosines(a: Float[Tensor, "*n width rank"], b: Float[Tensor, "*n width other"]) -> Float[Tensor, "*n"]:
    """`tr(P_a P_b) = ‖P_a P_b‖²_F`: the sum of `cos²` over the principal angles, or of how many directions are shared.

    Divided by the smaller rank it is the mean over the angles, and the same for `a, b` and `b, a`; divided by the rank
    of `a` it is the share of `a` that `b` holds.
    """
    return (a.mT @ b).square().sum(dim=(-2, -1))


def side_by_side(blocks: Sequence[Basis]) -> Float[Tensor, "block width rank"]:
    """Bases of one width as one tensor, with zero columns behind those of lower rank."""
    stacked = blocks[0].new_zeros(len(blocks), blocks[0].shape[0], max(block.shape[1] for block in blocks))
    for place, block in zip(stacked, blocks, strict=True):
        place[:, : block.shape[1]] = block
    return stacked


def check_shape(basis: Tensor, ranks: Sequence[int], what: str) -> None:
    """Raise `SPDError` unless a basis is real numbers `[block, width, rank]` with a possible rank for each block."""
    if basis.ndim != 3 or len(ranks) != basis.shape[0]:
        raise SPDError(f"{what} must be [block, width, rank], not {tuple(basis.shape)}")
    most = min(basis.shape[1:])
    if any(type(rank) is not int or not 0 <= rank <= most for rank in ranks):
        raise SPDError(f"{what} has the ranks {list(ranks)!r:.60}; they must be whole numbers from 0 to {most}")
    if not basis.is_floating_point():
        raise SPDError(f"{what} is {basis.dtype}; it must be real numbers in floating point, float64 at best")


def check_orthonormal(basis: Float[Tensor, "block width rank"], ranks: Sequence[int], what: str) -> None:
    """Raise `SPDError` unless each block has orthonormal columns up to its rank, and zero columns behind.

    Anything else would not project: longer columns enlarge what they should keep.
    """
    columns = torch.arange(basis.shape[2], device="cpu") < torch.tensor(ranks, device="cpu")[:, None]
    wide = basis.detach().to("cpu", torch.float64)
    off = (wide.mT @ wide - torch.diag_embed(columns.double())).abs()
    if off.numel() and not off.max() <= max(_ORTHONORMAL, 8 * torch.finfo(basis.dtype).eps):  # NaN too
        raise SPDError(
            f"{what} does not have orthonormal columns up to its rank and zeros behind (they are off by "
            f"{off.max().item():.2g}); make it by extract, or orthonormalise directions of your own, for instance with "
            "torch.linalg.qr"
        )
