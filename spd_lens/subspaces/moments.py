"""`GradientMoments`: what one extraction leaves behind, and all that a subspace of any rank needs (Eq. 8-9)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens.errors import SPDError, plain, whole
from spd_lens.files import load_tensors, reading, save_tensors
from spd_lens.models import Fingerprint, neutral
from spd_lens.sites import Site
from spd_lens.subspaces.spectrum import BlockSpectrum, diagonal_blocks
from spd_lens.subspaces.subspace import Rank, Subspace, resolve_rank

Gram = Float[Tensor, "shard width width"]


@dataclass
class GradientMoments:
    """Sums over tokens of `gᵀg` and `xᵀx` per site, in float64 and in a few shards of examples.

    The eigenvectors of `Σ gᵀg` are the right singular vectors of the stacked gradients `G`, its eigenvalues their
    squared singular values; its diagonal blocks are the per-head moments. Moments of disjoint examples add: `a + b`.
    Nothing in them is centred: `center_gradients` takes the mean row off when a subspace is made.
    """

    fingerprint: Fingerprint
    """The model they were taken from."""
    n_heads: dict[Site, int]
    """Heads at each site: KV heads for `k` and `v`, query heads for `q` and `z`, one for `resid`."""
    gradient: dict[Site, Gram]
    """`Σ gᵀg` over the tokens of each shard's examples."""
    activation: dict[Site, Gram]
    """`Σ xᵀx` over the same tokens."""
    activation_sum: dict[Site, Float[Tensor, "shard width"]]
    """`Σ x` over the same tokens."""
    n_tokens: Int[Tensor, " shard"]
    """Rows of `G`: all real tokens, scored or not (Eq. 8)."""
    n_scored: Int[Tensor, " shard"]
    """Tokens in `S` (Eq. 6)."""
    n_examples: Int[Tensor, " shard"]
    loss_sum: Float[Tensor, " shard"]
    """Sum over examples of the loss, in nats per scored token (Eq. 6)."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How they were taken: `loss`, `engine`, `dtype` of the model."""
    gradient_sum: dict[Site, Float[Tensor, "shard width"]] = field(default_factory=dict)
    """`Σ g` over the same tokens. Empty where an earlier version took the moments: they cannot be centred."""
    _spectra: dict[tuple[Site, bool, str, bool], BlockSpectrum] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    @neutral()
    def empty(
        cls, fingerprint: Fingerprint, sites: Iterable[Site], n_shards: int, settings: dict[str, Any]
    ) -> GradientMoments:
        """Moments of nothing, to be added to."""
        shapes = {site: fingerprint.heads_at(site) for site in sites}
        widths = {site: n_heads * d_head for site, (n_heads, d_head) in shapes.items()}

        zeros, counts = torch.zeros(n_shards, dtype=torch.float64), torch.zeros(n_shards, dtype=torch.long)
        return cls(
            fingerprint=fingerprint,
            n_heads={site: n_heads for site, (n_heads, _) in shapes.items()},
            gradient={site: zeros.new_zeros(n_shards, w, w) for site, w in widths.items()},
            activation={site: zeros.new_zeros(n_shards, w, w) for site, w in widths.items()},
            activation_sum={site: zeros.new_zeros(n_shards, w) for site, w in widths.items()},
            gradient_sum={site: zeros.new_zeros(n_shards, w) for site, w in widths.items()},
            n_tokens=counts,
            n_scored=counts.clone(),
            n_examples=counts.clone(),
            loss_sum=zeros,
            settings=settings,
        )

    @property
    def sites(self) -> list[Site]:
        return sorted(self.gradient)

    @property
    def n_shards(self) -> int:
        return len(self.n_examples)

    @property
    def mean_loss(self) -> float:
        """Mean over examples of the loss, in nats per scored token."""
        return (self.loss_sum.sum() / self.n_examples.sum()).item()

    @property
    def dtype(self) -> str:
        """Dtype of the model, in which the gradients were rounded."""
        return self.settings.get("dtype", "float32")

    def __repr__(self) -> str:
        return (
            f"GradientMoments({int(self.n_examples.sum())} examples, {int(self.n_tokens.sum())} tokens, "
            f"{int(self.n_scored.sum())} scored, {self.n_shards} shards, sites {', '.join(map(str, self.sites))})"
        )

    def add_tokens(
        self,
        site: Site,
        shard: int,
        gradients: Float[Tensor, "token width"],
        activations: Float[Tensor, "token width"],
    ) -> None:
        """Add one example's rows at one site. Products and sums are float64 whatever the model's dtype."""
        g, x = gradients.double(), activations.double()
        self.gradient[site][shard] += (g.T @ g).cpu()
        self.activation[site][shard] += (x.T @ x).cpu()
        self.activation_sum[site][shard] += x.sum(dim=0).cpu()
        if self.gradient_sum:
            self.gradient_sum[site][shard] += g.sum(dim=0).cpu()

    def __add__(self, other: GradientMoments) -> GradientMoments:
        """Moments of both sets of examples, which must be disjoint and taken in the same way from the same model.

        Where one of them cannot be centred, the sum cannot either.
        """
        if not isinstance(other, GradientMoments):
            return NotImplemented
        self.fingerprint.check(other.fingerprint, "the first of the two moments")
        for what in ("sites", "n_shards", "settings"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise SPDError(f"moments with {what} {mine} and {theirs} do not add; extract both in the same way")
        sums: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in _PER_SHARD}
        for name in _PER_SITE:
            mine, theirs = getattr(self, name), getattr(other, name)
            sums[name] = {site: mine[site] + theirs[site] for site in mine if site in theirs}
        return replace(self, **sums, _spectra={})

    @neutral()
    def shards(self, chosen: Sequence[int]) -> GradientMoments:
        """Some shards alone, for halves, jack-knife and bootstrap; an index given twice counts twice."""
        index = torch.tensor([whole("a shard", shard, least=None) for shard in chosen], dtype=torch.long)
        if not len(index) or index.min() < 0 or index.max() >= self.n_shards:
            raise SPDError(f"shards {list(chosen)} do not exist: the moments have shards 0 to {self.n_shards - 1}")
        parts: dict[str, Any] = {name: getattr(self, name)[index] for name in _PER_SHARD}
        for name in _PER_SITE:
            parts[name] = {site: value[index] for site, value in getattr(self, name).items()}
        return replace(self, **parts, _spectra={})

    def pooled(self) -> GradientMoments:
        """All shards added up into one, so that moments of different numbers of shards can be added."""
        parts: dict[str, Any] = {name: getattr(self, name).sum(dim=0, keepdim=True) for name in _PER_SHARD}
        for name in _PER_SITE:
            parts[name] = {site: value.sum(dim=0, keepdim=True) for site, value in getattr(self, name).items()}
        return replace(self, **parts)

    def halves(self) -> tuple[GradientMoments, GradientMoments]:
        """Two disjoint halves of the examples: even and odd shards."""
        if self.n_shards < 2:
            raise SPDError("moments with one shard have no halves; extract with shards=2 or more")
        return self.shards(range(0, self.n_shards, 2)), self.shards(range(1, self.n_shards, 2))

    def blocks(
        self, site: Site, per_head: bool = True, *, of: str = "gradient", center_gradients: bool = False
    ) -> Float[Tensor, "block width width"]:
        """`Σ gᵀg` (`of="gradient"`) or `Σ xᵀx` (`of="activation"`) over all shards: per head, or as one joint block.

        With `center_gradients` it is `Σ (g - ḡ)ᵀ(g - ḡ) = Σ gᵀg - n ḡᵀḡ`, with `ḡ` the mean over all `n` tokens. The
        subtraction leaves an error of about `2⁻⁵² ‖G‖²`, whatever is left of `‖G‖²`: directions whose singular value is
        below `√(width · 2⁻⁵²) ‖G‖` of the rows before centring are noise, and a subspace leaves them out. Activations
        are never centred here.

        Raises:
            SPDError: an earlier version took the moments, which kept no `Σ g`.
        """
        gram = {"gradient": self.gradient, "activation": self.activation}[of][site].sum(dim=0)
        if center_gradients and of == "gradient":
            if site not in self.gradient_sum:
                raise SPDError(
                    "these moments hold no sums of gradients, which earlier versions did not keep, so the mean cannot "
                    "be taken off; extract them again, in another folder, or leave center_gradients out"
                )
            total = self.gradient_sum[site].sum(dim=0)
            gram = gram - torch.outer(total, total) / self.n_tokens.sum()
        return diagonal_blocks(gram, self.n_heads[site] if per_head else 1)

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
                decompose; with `center_gradients`, moments of an earlier version.
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
                raise SPDError(f"the {of}s at site {site} are all zero; the scored tokens do not depend on it")
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

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file."""
        tensors = {f"{name}.{site}": v for name in _PER_SITE for site, v in getattr(self, name).items()}
        tensors |= {name: getattr(self, name) for name in _PER_SHARD}
        header = {
            "fingerprint": self.fingerprint.to_dict(),
            "n_heads": {str(site): n for site, n in self.n_heads.items()},
            "settings": self.settings,
        }
        return save_tensors(path, "gradient moments", tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> GradientMoments:
        """Read what `save` wrote; `SPDError` for a damaged or foreign file."""
        tensors, header = load_tensors(path, "gradient moments")
        with reading(path):
            n_heads = {Site.parse(site): n for site, n in header["n_heads"].items()}
            parts: dict[str, Any] = {name: tensors[name] for name in _PER_SHARD}
            for name in _PER_SITE:
                kept = [site for site in n_heads if name != "gradient_sum" or f"{name}.{site}" in tensors]
                parts[name] = {site: tensors[f"{name}.{site}"] for site in kept}
            fingerprint = Fingerprint.from_dict(header["fingerprint"])
            return cls(fingerprint=fingerprint, n_heads=n_heads, settings=header["settings"], **parts)


def _share(energy: float) -> float:
    """A share of the squared singular values as Python's own number; `SPDError` unless it is in (0, 1]."""
    share = plain(energy)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
        raise SPDError(
            f"energy {share!r} is no share in (0, 1] of the squared singular values; write 0.95, or a rank instead"
        )
    return float(share)


_PER_SITE = ("gradient", "activation", "activation_sum", "gradient_sum")
_PER_SHARD = ("n_tokens", "n_scored", "n_examples", "loss_sum")
