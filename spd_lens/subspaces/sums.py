"""`TokenSums`: sums over tokens, of which an extraction consists, and their arithmetic and file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens.errors import SPDError, whole
from spd_lens.files import Schema, fitting, holding, load_tensors, save_tensors
from spd_lens.models import Fingerprint, neutral
from spd_lens.sites import Site
from spd_lens.subspaces.positions import CLASSES
from spd_lens.subspaces.spectrum import diagonal_blocks

Gram = Float[Tensor, "shard *head width width"]
"""Of all heads side by side, or of each head alone (`across_heads=False`)."""


@dataclass
class TokenSums:
    """Sums over tokens of products of gradients `g` and activations `x`, in float64 and in a few shards of examples."""

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
    cross: dict[Site, Gram] = field(default_factory=dict)
    """`Σ gᵀx` over the same tokens. Empty unless they were taken with `keep="cross"`."""
    classes: Mapping[str, Self] = field(default_factory=dict)
    """The same sums over each class of positions alone. Empty unless they were taken with `keep="classes"`."""

    @classmethod
    @neutral()
    def empty(
        cls,
        fingerprint: Fingerprint,
        sites: Iterable[Site],
        n_shards: int,
        settings: dict[str, Any],
        keep: Sequence[str] = (),
        *,
        across_heads: bool = True,
    ) -> Self:
        """Moments of nothing, to be added to; `keep` and `across_heads` as in `extract`."""
        sites = list(sites)
        shapes = {site: fingerprint.heads_at(site) for site in sites}
        widths = {site: n_heads * d_head for site, (n_heads, d_head) in shapes.items()}
        own = [name for name in keep if name != "classes"]
        apart = CLASSES if "classes" in keep else ()
        zeros, counts = torch.zeros(n_shards, dtype=torch.float64), torch.zeros(n_shards, dtype=torch.long)
        grams = {
            site: (width, width) if across_heads else (*shapes[site], shapes[site][1]) for site, width in widths.items()
        }
        return cls(
            fingerprint=fingerprint,
            n_heads={site: n_heads for site, (n_heads, _) in shapes.items()},
            gradient={site: zeros.new_zeros(n_shards, *gram) for site, gram in grams.items()},
            activation={site: zeros.new_zeros(n_shards, *gram) for site, gram in grams.items()},
            activation_sum={site: zeros.new_zeros(n_shards, w) for site, w in widths.items()},
            gradient_sum={site: zeros.new_zeros(n_shards, w) for site, w in widths.items()},
            cross={site: zeros.new_zeros(n_shards, *gram) for site, gram in grams.items() if "cross" in keep},
            classes={
                name: cls.empty(fingerprint, sites, n_shards, settings, own, across_heads=across_heads)
                for name in apart
            },
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
    def across_heads(self) -> bool:
        """Whether they keep products across heads, which joint subspaces need."""
        return all(gram.ndim == 3 for gram in self.gradient.values())

    def width(self, site: Site) -> int:
        """Components of a row at a site: those of all of its heads."""
        return self.activation_sum[site].shape[-1]

    def grams(
        self, site: Site, per_head: bool = True, *, of: str = "gradient"
    ) -> Float[Tensor, "shard block width width"]:
        """Each shard's `Σ gᵀg` (`of="gradient"`) or `Σ xᵀx` (`of="activation"`), per head or as one joint block.

        Raises:
            SPDError: a joint block of moments that were taken with `across_heads=False`.
        """
        return self._blocks({"gradient": self.gradient, "activation": self.activation}[of][site], site, per_head)

    def _blocks(
        self, gram: Float[Tensor, "*shard width width"], site: Site, per_head: bool
    ) -> Float[Tensor, "*shard block row column"]:
        """The blocks of sums of products at a site, of some shards or of all together; exactly symmetric."""
        n_heads = self.n_heads[site]
        if self.across_heads:
            return diagonal_blocks(gram, n_heads if per_head else 1)
        if not per_head and n_heads > 1:
            raise SPDError(
                f"these moments keep no products across the {n_heads} heads of site {site}, which a joint subspace "
                "needs; extract them again with across_heads=True (--across-heads), or ask for one per head "
                "(per_head=True, --per-head)"
            )
        return (gram + gram.mT) / 2

    @property
    def kept(self) -> tuple[str, ...]:
        """What they keep beside the plain sums: `"classes"` of positions, `"cross"` products."""
        return tuple(name for name in ("classes", "cross") if getattr(self, name))

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
            f"{type(self).__name__}({int(self.n_examples.sum())} examples, {int(self.n_tokens.sum())} tokens, "
            f"{int(self.n_scored.sum())} scored, {self.n_shards} shards, sites {', '.join(map(str, self.sites))})"
        )

    def add_tokens(
        self,
        site: Site,
        shard: int,
        gradients: Float[Tensor, "token width"],
        activations: Float[Tensor, "token width"],
        positions: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Add one example's rows at one site. Products and sums are float64 whatever the model's dtype.

        Args:
            site: The site.
            shard: The shard of the example.
            gradients: Its gradients.
            activations: Its activations.
            positions: Which of the rows are of each class of positions; for moments that keep classes.
        """
        g, x = gradients.double(), activations.double()
        self.gradient[site][shard] += self._product(site, g, g)
        self.activation[site][shard] += self._product(site, x, x)
        self.activation_sum[site][shard] += x.sum(dim=0).cpu()
        if self.gradient_sum:
            self.gradient_sum[site][shard] += g.sum(dim=0).cpu()
        if self.cross:
            self.cross[site][shard] += self._product(site, g, x)
        for name, rows in (positions or {}).items():
            if name in self.classes:
                self.classes[name].add_tokens(site, shard, g[list(rows)], x[list(rows)])

    def _product(self, site: Site, a: Float[Tensor, "token width"], b: Float[Tensor, "token width"]) -> Tensor:
        """`aᵀb` over all heads, or of each head alone."""
        if self.across_heads:
            return (a.T @ b).cpu()
        a, b = (rearrange(rows, "token (head d) -> head token d", head=self.n_heads[site]) for rows in (a, b))
        return (a.mT @ b).cpu()

    def count(
        self, shard: int, loss: float, n_tokens: int, scored: Sequence[int], positions: Mapping[str, Sequence[int]]
    ) -> None:
        """Count one example, whose rows `add_tokens` added: its loss, its tokens, and the positions in `S`."""
        self.n_examples[shard] += 1
        self.n_tokens[shard] += n_tokens
        self.n_scored[shard] += len(scored)
        self.loss_sum[shard] += loss
        for name, part in self.classes.items():
            own = positions[name]
            part.count(shard, loss, len(own), [position for position in scored if position in own], {})

    @property
    def sums(self) -> list[Tensor]:
        """All sums and counts, with those of the classes: the tensors themselves, in an order that `keep` decides."""
        own = [getattr(self, name) for name in _PER_SHARD]
        own += [value for name in _PER_SITE for value in getattr(self, name).values()]
        return own + [value for part in self.classes.values() for value in part.sums]

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same moments with every sum changed in the same way along its shards."""
        parts: dict[str, Any] = {name: change(getattr(self, name)) for name in _PER_SHARD}
        for name in _PER_SITE:
            parts[name] = {site: change(value) for site, value in getattr(self, name).items()}
        return replace(self, **parts, classes={name: part._mapped(change) for name, part in self.classes.items()})

    def _plus(self, other: Self, counts: Sequence[str]) -> dict[str, Any]:
        """The sums of both, where both have them, and some of their counts."""
        sums: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in counts}
        for name in _PER_SITE:
            mine, theirs = getattr(self, name), getattr(other, name)
            sums[name] = {site: mine[site] + theirs[site] for site in mine if site in theirs}
        return sums

    def __add__(self, other: Self) -> Self:
        """Moments of both sets of examples, which must be disjoint and taken in the same way from the same model.

        What one of them does not keep (`Σ g`, without which moments cannot be centred, `Σ gᵀx`, classes of positions),
        the sum does not either.
        """
        if not isinstance(other, type(self)):
            return NotImplemented
        self.fingerprint.check(other.fingerprint, "the first of the two moments")
        for what in ("sites", "n_shards", "across_heads", "settings"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise SPDError(f"moments with {what} {mine} and {theirs} do not add; extract both in the same way")
        classes = {name: part + other.classes[name] for name, part in self.classes.items() if name in other.classes}
        return replace(self, **self._plus(other, _PER_SHARD), classes=classes)

    def region(self, *classes: str) -> Self:
        """Moments of some classes of positions alone, of the same examples: `region("completion", "scored")`.

        Classes are `"sink"` (the position on which attention rests when it has nowhere to go), `"prompt"`,
        `"completion"` (what is not scored of it) and `"scored"` (the tokens in `S`). The loss stays that of the
        examples. `settings` record the region.

        Raises:
            SPDError: no class, an unknown one, or moments that were taken without `keep="classes"`.
        """
        if not classes or (unknown := set(classes) - set(CLASSES)):
            named = f"no class of positions is called {sorted(unknown)[0]!r}" if classes else "a region has no class"
            raise SPDError(f"{named}; choose from {', '.join(CLASSES)}")
        chosen = [name for name in CLASSES if name in classes]
        if lost := [name for name in chosen if name not in self.classes]:
            instead = "extract them again with keep='classes' (--keep classes)"
            if region := self.settings.get("region"):
                instead = f"they are those of {', '.join(region)} alone, so take the region from the whole moments"
            raise SPDError(f"these moments do not keep the positions of class {lost[0]!r} apart; {instead}")
        own = {name: self.classes[name] for name in chosen}
        total, *others = own.values()
        for part in others:
            total = replace(total, **total._plus(part, ("n_tokens", "n_scored")))
        return replace(total, settings={**self.settings, "region": chosen}, classes=own)

    def at(self, sites: Iterable[Site]) -> Self:
        """Moments of some of their sites alone; `SPDError` for a site that was not extracted."""
        chosen = sorted(sites)
        for site in chosen:
            if site not in self.gradient:
                raise SPDError(f"site {site} was not extracted; the moments have {', '.join(map(str, self.sites))}")
        parts: dict[str, Any] = {}
        for name in ("n_heads", *_PER_SITE):
            parts[name] = {site: value for site, value in getattr(self, name).items() if site in chosen}
        return replace(self, **parts, classes={name: part.at(chosen) for name, part in self.classes.items()})

    @neutral()
    def shards(self, chosen: Sequence[int]) -> Self:
        """Some shards alone, for halves, jack-knife and bootstrap; an index given twice counts twice."""
        index = torch.tensor([whole("a shard", shard, least=None) for shard in chosen], dtype=torch.long)
        if not len(index) or index.min() < 0 or index.max() >= self.n_shards:
            raise SPDError(f"shards {list(chosen)} do not exist: the moments have shards 0 to {self.n_shards - 1}")
        return self._mapped(lambda sums: sums[index])

    def pooled(self) -> Self:
        """All shards added up into one, so that moments of different numbers of shards can be added."""
        return self._mapped(lambda sums: sums.sum(dim=0, keepdim=True))

    def halves(self) -> tuple[Self, Self]:
        """Two disjoint halves of the examples: even and odd shards."""
        if self.n_shards < 2:
            raise SPDError("moments with one shard have no halves; extract with shards=2 or more")
        return self.shards(range(0, self.n_shards, 2)), self.shards(range(1, self.n_shards, 2))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file."""
        header = {
            "fingerprint": self.fingerprint.to_dict(),
            "n_heads": {str(site): n for site, n in self.n_heads.items()},
            "settings": self.settings,
        }
        return save_tensors(path, "gradient moments", self._tensors(), header)

    def _tensors(self) -> dict[str, Tensor]:
        """All sums by their names in a file; those of a class begin with its name."""
        tensors = {f"{name}.{site}": v for name in _PER_SITE for site, v in getattr(self, name).items()}
        tensors |= {name: getattr(self, name) for name in _PER_SHARD}
        for name, part in self.classes.items():
            # copies: a region of one class is that class, and a file takes no tensor under two names
            tensors |= {f"{name}/{key}": value.clone() for key, value in part._tensors().items()}
        return tensors

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote; `SPDError` for a damaged or foreign file."""
        tensors, header = load_tensors(path, "gradient moments")
        of = fitting(_Header, header, path)
        with holding(path, "moments"):
            n_heads = {Site.parse(site): n for site, n in of.n_heads.items()}
            fingerprint = Fingerprint.from_dict(of.fingerprint, path)

            def part(prefix: str) -> dict[str, Any]:
                found: dict[str, Any] = {name: tensors[f"{prefix}{name}"] for name in _PER_SHARD}
                for name in _PER_SITE:
                    names = {site: f"{prefix}{name}.{site}" for site in n_heads}
                    kept = [site for site in n_heads if name not in _OPTIONAL or names[site] in tensors]
                    found[name] = {site: tensors[names[site]] for site in kept}
                return {"fingerprint": fingerprint, "n_heads": n_heads, "settings": of.settings, **found}

            there = [name for name in CLASSES if f"{name}/n_tokens" in tensors]
            made = cls(**part(""), classes={name: cls(**part(f"{name}/")) for name in there})
            if fault := next(filter(None, (one.fault() for one in (made, *made.classes.values()))), None):
                raise SPDError(fault)
        return made

    def fault(self) -> str | None:
        """What is impossible in these sums, in words; None if nothing is."""
        if not self.n_heads or not self.n_shards:
            return "they have no site or no shard"
        kind = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else None
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            return f"their dtype is {self.dtype!r:.60}"
        for name in _PER_SHARD:
            value: Tensor = getattr(self, name)
            if value.dtype != (torch.float64 if name == "loss_sum" else torch.int64) or value.shape != (self.n_shards,):
                return f"{name} is {value.dtype} of the shape {tuple(value.shape)}"
            if not value.isfinite().all() or (name != "loss_sum" and value.min() < 0):
                return f"{name} is {value.tolist()!r:.60}"
        return next(filter(None, map(self._fault_at, self.n_heads)), None)

    def _fault_at(self, site: Site) -> str | None:
        (n_heads, d_head), shard = self.fingerprint.heads_at(site), self.n_shards
        if site.layer >= self.fingerprint.n_layers or self.n_heads[site] != n_heads:
            return f"the model has no site {site} of {self.n_heads[site]} heads"
        width = n_heads * d_head
        for name in _PER_SITE:
            value = getattr(self, name).get(site)
            if value is None:
                continue
            shapes = (
                ((shard, width),)
                if name.endswith("_sum")
                else ((shard, width, width), (shard, n_heads, d_head, d_head))
            )
            if value.dtype != torch.float64 or value.shape not in shapes:
                return f"{name} of site {site} is {value.dtype} of the shape {tuple(value.shape)}"
            if not value.isfinite().all():
                return f"{name} of site {site} has values that are no finite numbers"
            if name in ("gradient", "activation") and value.diagonal(dim1=-2, dim2=-1).min() < 0:
                return f"{name} of site {site} has negative sums of squares"
        return None


class _Header(Schema, extra="ignore"):
    """What stands in the file of moments beside their tensors."""

    fingerprint: dict[str, Any]
    n_heads: dict[str, int]
    settings: dict[str, Any]


def moments_size(
    heads: Iterable[tuple[int, int]], n_shards: int, keep: Sequence[str] = (), *, across_heads: bool = True
) -> int:
    """Bytes of moments, a few counts aside.

    Args:
        heads: For each site, how many heads it has and how wide they are.
        n_shards: Shards of examples.
        keep: As in `extract`.
        across_heads: As in `extract`.
    """
    n_grams, copies = 2 + ("cross" in keep), 1 + len(CLASSES) * ("classes" in keep)
    numbers = sum(n * d * (n_grams * d * (n if across_heads else 1) + 2) for n, d in heads)
    return torch.float64.itemsize * copies * n_shards * numbers


_PER_SITE = ("gradient", "activation", "activation_sum", "gradient_sum", "cross")
_OPTIONAL = ("gradient_sum", "cross")
_PER_SHARD = ("n_tokens", "n_scored", "n_examples", "loss_sum")
