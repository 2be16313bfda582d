"""`BlockSpectrum`: the one eigendecomposition of a block's Gram matrix, from which all about its directions follows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens.subspaces.bases import Basis, upright


def diagonal_blocks(gram: Float[Tensor, "*n width width"], n: int) -> Float[Tensor, "*n block row column"]:
    """The `n` blocks on the diagonal of Gram matrices, exactly symmetric, which `eigh` assumes."""
    split = rearrange((gram + gram.mT) / 2, "... (i row) (j column) -> ... i j row column", i=n, j=n)
    return split.diagonal(dim1=-4, dim2=-3).movedim(-1, -3).contiguous()


def energies_of(gram: Float[Tensor, "*n width width"]) -> Float[Tensor, "*n width"]:
    """`BlockSpectrum.energies` up to rounding, in half the time: without the directions."""
    return torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0)


def rank_holding(energies: Float[Tensor, "*n width"], share: float) -> Int[Tensor, "*n"]:
    """The smallest number of leading directions that hold at least `share` of the energy; energies descending."""
    cumulative = energies.cumsum(dim=-1) / energies.sum(dim=-1, keepdim=True)
    # rounding: the sum over all directions may miss 1 by a hair
    return 1 + (cumulative < share - 1e-12).sum(dim=-1)


@dataclass(frozen=True, eq=False)
class BlockSpectrum:
    """Spectra of blocks: of one site's heads, or of one joint block, also for several sets of examples at once.

    Its tensors may be shared: they are to be read, not written to. What is called rounding is that of the gradients in
    the model's dtype, such as `"bfloat16"`.
    """

    gram: Float[Tensor, "*n width width"]
    """What was decomposed: `Σ gᵀg` or `Σ xᵀx`."""
    energies: Float[Tensor, "*n width"]
    """Its eigenvalues `σ²`, descending: the squared singular values of the stacked rows."""
    vectors: Float[Tensor, "*n width width"]
    """Its eigenvectors as columns, in the same order: the right singular vectors of the stacked rows."""
    size: Float[Tensor, "*n"] | None = None
    """The norm `‖G‖` of the rows as they were rounded, where their mean was taken off since; else they are the rows."""

    @classmethod
    def of(cls, gram: Float[Tensor, "*n width width"], size: Float[Tensor, "*n"] | None = None) -> BlockSpectrum:
        """Decompose Gram matrices, which must be exactly symmetric."""
        values, vectors = torch.linalg.eigh(gram)
        # rounding leaves eigenvalues of -1e-20 where there is none
        return cls(gram, values.flip(-1).clamp_min(0), vectors.flip(-1), size)

    @property
    def singular_values(self) -> Float[Tensor, "*n width"]:
        """Singular values of the stacked rows, descending (Eq. 9)."""
        return self.energies.sqrt()

    def n_known(self, dtype: str) -> Int[Tensor, "*n"]:
        """How many singular values of each block stand above what rounding alone would leave.

        Rounding each entry of `G` to a relative `eps` adds noise of norm about `eps ‖G‖` spread over `width`
        directions, so each noise singular value is about `eps ‖G‖ / √width`; the Gram matrix adds a floor of its own.
        Both go by the rows before a mean was taken off: what is left may be much smaller, and its rounding is not.
        """
        values = self.singular_values
        width = values.shape[-1]
        size = values.norm(dim=-1, keepdim=True) if self.size is None else self.size[..., None]
        noise = torch.finfo(getattr(torch, dtype)).eps * size / width**0.5
        largest = values[..., :1] if self.size is None else size
        gram_floor = (width * torch.finfo(torch.float64).eps) ** 0.5 * largest
        return (values > torch.maximum(noise, gram_floor)).sum(dim=-1)

    def known(self, dtype: str) -> tuple[Float[Tensor, "*n width"], Float[Tensor, "*n width width"]]:
        """Energies and directions, with zeros for those that rounding alone would leave."""
        known = torch.arange(self.energies.shape[-1]) < self.n_known(dtype)[..., None]
        return self.energies * known, self.vectors * known[..., None, :]

    def holding(self, share: float) -> Int[Tensor, "*n"]:
        """How many leading directions of each block hold at least that share of its energy; 1 where there is none."""
        return rank_holding(self.energies, share)

    def leading(self, rank: int | Int[Tensor, " block"], dtype: str) -> list[Basis]:
        """The leading `rank` directions of each block, or as many as stand above rounding."""
        ranks = self.n_known(dtype).clamp_max(rank).tolist()
        return [upright(vectors[:, :own]) for vectors, own in zip(self.vectors, ranks, strict=True)]
