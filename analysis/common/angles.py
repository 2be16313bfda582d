"""Measures between subspaces of one space, and on one spectrum: pure mathematics on bases and energies, float64.

A basis is `[width, rank]` with orthonormal columns; a Gram matrix `Σ gᵀg` is `[width, width]`; energies are its
eigenvalues `σ²`. Random subspaces are uniform (Haar): what any two subspaces of these ranks share by chance.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.errors import SPDError
from spd_lens.subspaces import random_basis, squared_cosines

Basis = Float[Tensor, "width rank"]


def principal_angles(a: Basis, b: Float[Tensor, "width other"]) -> Float[Tensor, " angle"]:
    """Principal angles in radians, ascending; as many as the smaller rank.

    Björck and Golub (1973), Knyazev and Argentati (2002), as in `scipy.linalg.subspace_angles`: angles below 45° come
    from their sines, since the cosine cannot tell angles below 1e-8 from 0.
    """
    _check(a, b)
    angles = scipy.linalg.subspace_angles(a.double().numpy(), b.double().numpy())
    return torch.from_numpy(angles[::-1].copy())


def mean_squared_cosine(a: Float[Tensor, "*n width rank"], b: Float[Tensor, "*n width other"]) -> Float[Tensor, "*n"]:
    """`‖P_a P_b‖²_F / min(rank_a, rank_b)`: mean over the principal angles of `cos²`; 1 if one holds the other.

    For random subspaces its expectation is `max(rank_a, rank_b) / width`.
    """
    _check(a, b)
    return squared_cosines(a, b) / min(a.shape[-1], b.shape[-1])


def cosine_by_rank(
    a: Float[Tensor, "*n width rank"], b: Float[Tensor, "*n width other"]
) -> Float[Tensor, "*n smaller"]:
    """`mean_squared_cosine` of the leading 1, 2, ... directions of both."""
    corner = (a.mT @ b).square().cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1)
    return (corner / torch.arange(1, corner.shape[-1] + 1)).clamp(0, 1)


def energy_share(basis: Float[Tensor, "*n width rank"], gram: Float[Tensor, "*n width width"]) -> Float[Tensor, "*n"]:
    """`tr(P C) / tr C`: how much of the energy in `C` a subspace holds.

    Not symmetric between two domains, and defined for any rank. For a random subspace its expectation is
    `rank / width`, whatever `C` is.
    """
    held = ((gram @ basis) * basis).sum(dim=(-2, -1))
    return (held / gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)).clamp(0, 1)  # rounding passes 1 by a hair


def energy_by_rank(
    basis: Float[Tensor, "*n width rank"], gram: Float[Tensor, "*n width width"]
) -> Float[Tensor, "*n rank"]:
    """`energy_share` of the leading 1, 2, ... directions."""
    held = ((gram @ basis) * basis).sum(dim=-2).cumsum(dim=-1)
    return (held / gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1, keepdim=True)).clamp(0, 1)


def random_bases(n: int, width: int, rank: int, seed: int) -> Float[Tensor, "n width rank"]:
    """Bases of uniformly random subspaces; their leading columns span uniformly random subspaces too."""
    if not 1 <= rank <= width or n < 1:
        raise SPDError(f"{n} random subspaces of rank {rank} in {width} dimensions do not exist")
    return random_basis(width, rank, torch.Generator().manual_seed(seed), n)


def p_value(observed: float, null: Float[Tensor, " draw"], *, smaller: bool = False) -> float:
    """Monte-Carlo p-value `(1 + #{null ≥ observed}) / (1 + draws)`, never 0 (Phipson and Smyth 2010).

    Nulls at or below the observed value count instead if `smaller`. Ties to within rounding count against the claim.
    """
    slack = 1e-12 * max(1.0, abs(observed))
    extreme = null <= observed + slack if smaller else null >= observed - slack
    return (1 + int(extreme.sum())) / (1 + len(null))


def beside_null(value: float, null: Float[Tensor, " draw"], *, smaller: bool = False) -> dict[str, float]:
    """A row's columns `value, null, null_low, null_high, p`: the null's mean and central 95 %, and the p-value."""
    low, high = np.quantile(null.numpy(), [0.025, 0.975]).tolist()
    p = p_value(value, null, smaller=smaller)
    return {"value": value, "null": float(null.numpy().mean()), "null_low": low, "null_high": high, "p": p}


def participation_ratio(energies: Float[Tensor, "*n width"]) -> Float[Tensor, "*n"]:
    """`(Σ λ)² / Σ λ²`: how many directions of equal energy would spread as much."""
    return energies.sum(dim=-1).square() / energies.square().sum(dim=-1)


def entropy_rank(energies: Float[Tensor, "*n width"]) -> Float[Tensor, "*n"]:
    """`exp` of the entropy of the normalised energies (effective rank of Roy and Vetterli 2007, here of `σ²`)."""
    share = energies / energies.sum(dim=-1, keepdim=True)
    return torch.special.entr(share).sum(dim=-1).exp()


def stable_rank(energies: Float[Tensor, "*n width"]) -> Float[Tensor, "*n"]:
    """`‖G‖²_F / ‖G‖²₂ = Σ λ / max λ`."""
    return energies.sum(dim=-1) / energies.amax(dim=-1)


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape[-2] != b.shape[-2]:
        raise SPDError(
            f"subspaces of {a.shape[-2]}- and {b.shape[-2]}-dimensional spaces have no angles between them; compare "
            "per-head with per-head and joint with joint bases of one site"
        )
    if not a.shape[-1] or not b.shape[-1]:
        raise SPDError("a subspace of rank 0 has no angles to another; leave such blocks out")
