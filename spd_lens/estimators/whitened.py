"""The gradients in units of what the activations do anyway."""

from __future__ import annotations

import torch

from spd_lens.estimators.base import Estimator, Shape, Source
from spd_lens.estimators.directions import NO_SPECTRUM, activation_blocks, subspace_of
from spd_lens.estimators.registry import register
from spd_lens.models import neutral
from spd_lens.subspaces import Subspace, resolve_rank, upright


@register
class Whitened(Estimator):
    """The directions with the most gradient energy per activation energy: `Σgᵀg v = λ (Σxᵀx + εI) v`.

    The generalised eigenvectors `v` are not orthogonal. What is kept is the span of the leading ones, as the `Q` of
    their QR decomposition: its first `r` columns span the first `r` eigenvectors. `ε` is `ridge` times the mean
    activation energy of a direction, so that a direction which is hardly used is not chosen for that alone.
    """

    name = "whitened"
    says = "directions with the most gradient energy per activation energy (generalised eigenvectors)"
    lacks = NO_SPECTRUM
    ridge = 1e-3
    """Small beside the mean: one direction can hold nearly all of a head's activation energy."""

    @neutral()
    def estimate(self, source: Source, shape: Shape) -> Subspace:
        moments, bases = self.moments(source), {}
        for site in moments.sites:
            spectrum = moments.spectrum(site, shape.per_head)
            energy = activation_blocks(moments, site, shape)
            width = energy.shape[-1]
            mean = energy.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
            floor = self.ridge * torch.where(mean > 0, mean, 1.0)
            root = torch.linalg.cholesky(energy + floor[:, None, None] * torch.eye(width, dtype=energy.dtype))
            energies, known = spectrum.known(moments.dtype)  # the inverse would blow up what rounding left
            half = torch.linalg.solve_triangular(root, (known * energies[..., None, :]) @ known.mT, upper=False)
            white = torch.linalg.solve_triangular(root, half.mT, upper=False)
            vectors = torch.linalg.eigh((white + white.mT) / 2).eigenvectors.flip(-1)
            directions = torch.linalg.solve_triangular(root.mT, vectors, upper=True)
            ranks = spectrum.n_known(moments.dtype).clamp_max(resolve_rank(shape.rank, width)).tolist()
            bases[site] = [upright(torch.linalg.qr(own[:, :r]).Q) for own, r in zip(directions, ranks, strict=True)]
        return subspace_of(bases, moments, shape, ridge=self.ridge)
