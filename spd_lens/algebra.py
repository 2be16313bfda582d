"""Subspaces composed: `a | b` spans both, `a & b` is what they share, `~a` is what `a` leaves out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.errors import SPDError
from spd_lens.models.fingerprint import Fingerprint
from spd_lens.models.neutral import neutral
from spd_lens.sites import Site

if TYPE_CHECKING:
    from spd_lens.subspace import Subspace

TOLERANCE = 1e-6
"""Radians. Two directions that are closer count as one; extraction in float64 leaves angles of about 1e-8."""


@neutral()
def union(a: Subspace, b: Subspace, tolerance: float = TOLERANCE) -> Subspace:
    """The span of both, block by block.

    A site that only one of them projects is kept whole by the other, so the union leaves it alone: the result has the
    sites they share. To weigh two domains by their gradients instead, add their moments.

    Raises:
        SPDError: different blocks or means, different models, or no site in common.
    """
    shared = [site for site in a.sites if site in b.bases]
    if not shared:
        raise SPDError("the two subspaces have no site in common, so their union keeps everything; nothing is left")
    _check_fit(a, b, shared)
    spans = {}
    for site in shared:
        spans[site] = [_span(torch.cat(pair, dim=1), tolerance) for pair in _pairs(a, b, site)]
    return _built(a, b, spans, "union")


@neutral()
def intersection(a: Subspace, b: Subspace, tolerance: float = TOLERANCE) -> Subspace:
    """The directions that both hold, block by block.

    A direction counts as shared if some direction of the other is within `tolerance` radians; the result holds the
    bisector of the two. Half-rank subspaces of different origin share none exactly: give the angle that you would call
    the same. A site that only one of them projects keeps that one's directions. Blocks may end up with rank 0, which
    removes their activation altogether; `ranks` says where.

    Raises:
        SPDError: different blocks or means, or different models.
    """
    if not 0.0 <= tolerance < torch.pi / 2:
        raise SPDError(f"tolerance {tolerance} is no angle between 0 and pi/2 radians; give a small one such as 0.1")
    shared = [site for site in a.sites if site in b.bases]
    _check_fit(a, b, shared)
    spans = {site: [_shared(x, y, tolerance) for x, y in _pairs(a, b, site)] for site in shared}
    for one in (a, b):
        for site in one.sites:
            if site not in spans:
                spans[site] = _blocks(one, site)
    return _built(a, b, spans, "intersection")


@neutral()
def complement(a: Subspace) -> Subspace:
    """What `a` leaves out, block by block: its projector is `I - P`. Applied around the same mean, if there is one."""
    spans: dict[Site, list[Tensor]] = {}
    for site in a.sites:
        spans[site] = []
        for basis in _blocks(a, site):
            # the complete factorisation appends an orthonormal basis of the rest
            full = torch.linalg.qr(basis, mode="complete").Q
            spans[site].append(full[:, basis.shape[1] :])
    bases, ranks = _padded(spans)
    return replace(
        a, bases=bases, ranks=ranks, singular_values={}, rank=None, origin={"complement": dict(a.origin)}
    )  # fmt: skip


def _blocks(a: Subspace, site: Site) -> list[Float[Tensor, "width rank"]]:
    """Each block's basis without its zero columns."""
    return [basis[:, :rank] for basis, rank in zip(a.bases[site], a.ranks[site], strict=True)]


def _pairs(
    a: Subspace, b: Subspace, site: Site
) -> list[tuple[Float[Tensor, "width rank_a"], Float[Tensor, "width rank_b"]]]:
    return list(zip(_blocks(a, site), _blocks(b, site), strict=True))


def _span(directions: Float[Tensor, "width n"], tolerance: float) -> Float[Tensor, "width rank"]:
    """Orthonormal basis of unit vectors' span. Two at an angle θ have the singular values `√2 cos(θ/2)` and
    `√2 sin(θ/2)`."""
    left, values, _ = torch.linalg.svd(directions, full_matrices=False)
    return left[:, values > 2**0.5 * math.sin(tolerance / 2)]


def _shared(
    a: Float[Tensor, "width rank_a"], b: Float[Tensor, "width rank_b"], tolerance: float
) -> Float[Tensor, "width rank"]:
    left, _, right = torch.linalg.svd(a.T @ b, full_matrices=False)
    u, v = a @ left, b @ right.mT  # principal vectors, in pairs; of different pairs orthogonal
    # From the chord and not from the cosine, which cannot tell angles below 1e-8 from 0.
    angle = 2 * torch.asin(((u - v).norm(dim=0) / 2).clamp(max=1.0))
    both = (u + v)[:, angle <= tolerance]
    return both / both.norm(dim=0, keepdim=True)


def _padded(
    spans: Mapping[Site, list[Float[Tensor, "width rank"]]],
) -> tuple[dict[Site, Float[Tensor, "block width rank"]], dict[Site, tuple[int, ...]]]:
    bases, ranks = {}, {}
    for site, blocks in spans.items():
        ranks[site] = tuple(block.shape[1] for block in blocks)
        bases[site] = torch.zeros(len(blocks), blocks[0].shape[0], max(ranks[site]), dtype=torch.float64)
        for place, block in zip(bases[site], blocks, strict=True):
            place[:, : block.shape[1]] = block
    return bases, ranks


def _built(a: Subspace, b: Subspace, spans: Mapping[Site, list[Tensor]], how: str) -> Subspace:
    bases, ranks = _padded(spans)
    means = {**b.offset, **a.offset}
    return replace(
        a,
        bases=bases,
        ranks=ranks,
        singular_values={},
        offset={site: means[site] for site in bases if site in means},
        rank=None,
        fingerprint=a.fingerprint or b.fingerprint,
        origin={how: [dict(a.origin), dict(b.origin)]},
    )


def _check_fit(a: Subspace, b: Subspace, shared: list[Site]) -> None:
    if isinstance(a.fingerprint, Fingerprint) and isinstance(b.fingerprint, Fingerprint):
        a.fingerprint.check(b.fingerprint, "the first of the two subspaces")
    for site in shared:
        mine, theirs = a.bases[site].shape[:2], b.bases[site].shape[:2]
        if mine != theirs:
            raise SPDError(
                f"at site {site} one subspace has {mine[0]} blocks of width {mine[1]} and the other {theirs[0]} of "
                f"{theirs[1]}; make both per head or both joint"
            )
        means = [one.offset.get(site) for one in (a, b)]
        if (means[0] is None) != (means[1] is None) or (means[0] is not None and not torch.equal(*means)):  # type: ignore[arg-type]  # both are there
            raise SPDError(
                f"the subspaces are centred differently at site {site}, so they are not composed; centre neither, or "
                "add their moments and centre the sum"
            )
