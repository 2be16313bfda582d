"""`GradientMoments`: what one extraction leaves behind, and all that a subspace of any rank needs (Eq. 8-9)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.errors import SPDError, plain
from spd_lens.models import neutral
from spd_lens.sites import Site
from spd_lens.subspaces.spectrum import BlockSpectrum
from spd_lens.subspaces.subspace import Rank, Subspace, resolve_rank
from spd_lens.subspaces.sums import TokenSums


@dataclass(repr=False)
class GradientMoments(TokenSums):
    """Sums over tokens of `gᵀg` and `xᵀx` per site, in float64 and in a few shards of examples.

    The eigenvectors of `Σ gᵀg` are the right singular vectors of the stacked gradients `G`, its eigenvalues their
    squared singular values; its diagonal blocks are the per-head moments. Moments of disjoint examples add: `a + b`.
    Nothing in them is centred: `center_gradients` takes the mean row off when a subspace is made.
    """

    _spectra: dict[tuple[Site, bool, str, bool], BlockSpectrum] = field(init=False, default_factory=dict, compare=False)

    def blocks(
        self, site: Site, per_head: bool = True, *, of: str = "gradient", center_gradients: bool = False
    ) -> Float[Tensor, "block width width"]:
        """`Σ gᵀg` (`of="gradient"`) or `Σ xᵀx` (`of="activation"`) over all shards: per head, or as one joint block.

        With `center_gradients` it is `Σ (g - ḡ)ᵀ(g - ḡ) = Σ gᵀg - n ḡᵀḡ`, with `ḡ` the mean over all `n` tokens. The
        subtraction leaves an error of about `2⁻⁵² ‖G‖²`, whatever is left of `‖G‖²`: directions whose singular value is
        below `√(width · 2⁻⁵²) ‖G‖` of the rows before centring are noise, and a subspace leaves them out. Activations
        are never centred here.

        Raises:
            SPDError: an earlier version took the moments, which kept no `Σ g`; or they were taken with
                `across_heads=False`, and a joint block is asked for.
        """
        gram = {"gradient": self.gradient, "activation": self.activation}[of][site].sum(dim=0)
        blocks = self._blocks(gram, site, per_head)
        if center_gradients and of == "gradient":
            if site not in self.gradient_sum:
                raise SPDError(
                    "these moments hold no sums of gradients, which earlier versions did not keep, so the mean cannot "
                    "be taken off; extract them again, in another folder, or leave center_gradients out"
                )
            total = self.gradient_sum[site].sum(dim=0).view(len(blocks), -1)
            blocks = blocks - total[:, :, None] * total[:, None, :] / self.n_tokens.sum().clamp_min(1)
        return blocks

    @neutral()
    def spectrum(
        self, site: Site, per_head: bool = True, *, of: str = "gradient", center_gradients: bool = False
    ) -> BlockSpectrum:
        """The decomposition of `blocks(...)`, computed once and kept for as long as these sums stay what they are."""
        centred = center_gradients and of == "gradient"
        gram, key = self.blocks(site, per_head, of=of, center_gradients=centred), (site, per_head, of, centred)
        if key not in self._spectra or not torch.equal(self._spectra[key].gram, gram):
            traces = self.blocks(site, per_head).diagonal(dim1=-2, dim2=-1).sum(dim=-1) if centred else None
            self._spectra[key] = BlockSpectrum.of(gram, None if traces is None else traces.sqrt())
        return self._spectra[key]

    def attribution(self, site: Site, per_head: bool = True) -> Float[Tensor, "block width width"]:
        """`A = Σ (gᵀx + xᵀg) / 2` over all shards: per head, or as one joint block.

        Removing the unit direction `v` from every row, `x -> x - x v vᵀ`, changes the sum of the examples' losses by
        `Σ g · (-x v vᵀ) = -vᵀ A v` to first order.

        Raises:
            SPDError: the moments were taken without `keep="cross"`, or a joint block with `across_heads=False`.
        """
        if site not in self.cross:
            raise SPDError(
                "these moments keep no products of gradients and activations; extract them again with keep='cross' "
                "(--keep cross)"
            )
        return self._blocks(self.cross[site].sum(dim=0), site, per_head)

    def mean(self, site: Site, per_head: bool = True) -> Float[Tensor, "block width"]:
        """Mean activation over all tokens."""
        mean = self.activation_sum[site].sum(dim=0) / self.n_tokens.sum()
        return mean.view(self.n_heads[site] if per_head else 1, -1)

    def singular_values(
        self, site: Site, per_head: bool = True, *, center_gradients: bool = False
    ) -> Float[Tensor, "block width"]:
        """Singular values of the stacked gradients, descending (Eq. 9); with `center_gradients` without their mean."""
        return self.spectrum(site, per_head, center_gradients=center_gradients).singular_values

    @neutral()
    def subspace(
        self,
        rank: Rank = 0.5,
        *,
        energy: float | None = None,
        per_head: bool = True,
        sites: Iterable[Site] | None = None,
        center_gradients: bool = False,
        center: bool = False,
        of: str = "gradient",
    ) -> Subspace:
        """The top right singular vectors of each block (Eq. 9-11).

        Args:
            rank: Directions per block: an integer, or a fraction of the block's width (half in the paper). Where the
                gradients have fewer directions than that, the rank is theirs and `Subspace.ranks` says so.
            energy: In place of the rank a share in (0, 1] of each block's squared singular values, such as 0.95: the
                fewest leading directions that reach it. `Subspace.origin` records it, and its `rank` is None.
            per_head: Whether each head gets a projector of its own, or all heads one joint projector.
            sites: The sites to take, among those that were extracted; all by default.
            center_gradients: Whether the mean row of all gradients is taken off before the decomposition, as in the
                reference code (github.com/gh540-svg/hahaha, commit e249fec). The paper's Eq. 8-9 do not. It concerns
                gradients alone: top directions of the activations are the same either way.
            center: Whether to project around the mean activation instead of the origin. The paper does not.
            of: `"gradient"`, or as a control `"activation"`: the top directions of the activations themselves.

        Raises:
            SPDError: no examples, a site that was not extracted, a rank or a share out of range, or nothing to
                decompose; with `center_gradients`, moments of an earlier version; a joint subspace of moments that
                were taken with `across_heads=False`.
        """
        if not int(self.n_examples.sum()):
            raise SPDError("there are no examples in these moments, so there is no subspace")
        rank, energy = plain(rank), None if energy is None else _share(energy)
        centred = center_gradients and of == "gradient"
        chosen = self.sites if sites is None else sorted(sites)
        bases: dict[Site, list[Tensor]] = {}
        values: dict[Site, Tensor] = {}
        for site in chosen:
            if site not in self.gradient:
                raise SPDError(f"site {site} was not extracted; the moments have {', '.join(map(str, self.sites))}")
            spectrum = self.spectrum(site, per_head, of=of, center_gradients=centred)
            values[site] = spectrum.singular_values
            limit = resolve_rank(rank, values[site].shape[-1]) if energy is None else spectrum.holding(energy)
            bases[site] = spectrum.leading(limit, self.dtype)
            if not any(basis.shape[1] for basis in bases[site]):
                if centred and self.gradient[site].any():
                    raise SPDError(f"nothing is left of the gradients at site {site} without their mean; give examples")
                where = f" of the region {', '.join(region)}" if (region := self.settings.get("region")) else ""
                raise SPDError(f"the {of}s{where} at site {site} are all zero; the scored tokens do not depend on it")
        return Subspace.from_blocks(
            bases,
            singular_values=values,
            offset={site: self.mean(site, per_head) for site in chosen} if center else {},
            rank=rank if energy is None else None,
            fingerprint=self.fingerprint,
            origin={
                **({} if of == "gradient" else {"of": of}),
                **({} if energy is None else {"energy": energy}),
                **({"center_gradients": True} if centred else {}),
                **self.settings,
                "n_examples": int(self.n_examples.sum()),
                "n_tokens": int(self.n_tokens.sum()),
                "n_scored": int(self.n_scored.sum()),
            },
        )


def _share(energy: float) -> float:
    """A share of the squared singular values as Python's own number; `SPDError` unless it is in (0, 1]."""
    share = plain(energy)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
        raise SPDError(
            f"energy {share!r} is no share in (0, 1] of the squared singular values; write 0.95, or a rank instead"
        )
    return float(share)
