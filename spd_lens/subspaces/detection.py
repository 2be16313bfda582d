"""`detect`: has a projection been folded into these weights? It leaves an exact lack of rank, which training does not.

A folded projection writes `P W` where `W` was. The rows of a head then lie in `r` dimensions, up to the rounding of the
file's dtype, and the left singular vectors of what is stored are the directions that were kept. Weights that were only
trained or drawn have small singular values, but none that is zero up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.errors import SPDError
from spd_lens.models import StoredLayer, StoredLayers
from spd_lens.sites import Site
from spd_lens.subspaces.bases import rest, squared_cosines
from spd_lens.subspaces.subspace import Subspace

KINDS = ("k", "v", "q", "z")
"""The kinds of sites whose projection one layer's weights can hold."""
GAP = 3.0
"""How many times the smallest singular value that counts must stand above the largest that counts as zero."""
SAME = 0.99
"""Two subspaces of the same ranks count as the same from this overlap on. A kept direction of little weight is known
only up to the rounding of the file, in bfloat16 to a few degrees."""
EXPLAINED = 0.05
"""A change from the base is a projection if it leaves at most this share of its size unexplained."""


@dataclass(frozen=True)
class Match:
    """How a known subspace compares with what was found, at the sites that both have."""

    name: str
    n_sites: int
    overlap: float | None
    """`tr(P_a P_b)` over the smaller ranks; 1 for the same directions. None where blocks or sites differ."""
    chance: float | None
    """The same of random directions of these ranks."""
    same_ranks: bool
    """Whether sites, ranks and the sites of offsets are the same."""

    @property
    def is_same(self) -> bool:
        """Whether it is the projection that is in the weights, as far as these sites show."""
        return self.same_ranks and self.overlap is not None and self.overlap >= SAME

    def __str__(self) -> str:
        if self.overlap is None:
            return f"{self.name}: not comparable, it has other sites or blocks"
        what = "this is the projection" if self.is_same else "another one"
        ranks = "the same ranks" if self.same_ranks else "other sites, ranks or offsets"
        return (
            f"{self.name}: {what} (overlap {self.overlap:.4f} at {self.n_sites} sites, {self.chance:.2f} for random "
            f"directions; {ranks})"
        )


@dataclass(frozen=True)
class Detection:
    """What `detect` found in a checkpoint."""

    checkpoint: str
    subspace: Subspace | None
    """The directions that are left at each site with a projection, to be saved, applied and compared; `offset` where it
    is not around the origin. None where there is no projection."""
    strengths: Mapping[Site, float]
    """The strength of the projection at each such site; 1 without a base, where weaker ones do not show."""
    changed: tuple[Site, ...]
    """Sites that differ from the base in another way than by a projection; empty without a base."""
    empty: tuple[Site, ...]
    """Sites with a head whose weights are all zero, such as a pruned one."""
    n_sites: int
    """How many sites were looked at."""
    margin: float
    """At the sites without a projection: the smallest singular value over the largest that would count as zero. Far
    above 1, there is no doubt. Blocks that are about square are left out: their smallest ones are near 0 by chance."""
    matches: tuple[Match, ...] = ()

    def lines(self) -> Iterator[str]:
        """What was found, as sentences for a terminal."""
        if self.subspace is None:
            yield f"no projection in {self.n_sites} sites"
        else:
            yield from self._projections(self.subspace)
        if self.margin < float("inf"):  # with a base, it is the change that is looked at
            yield f"at sites without one the smallest singular value is {self.margin:.3g} times what rounding leaves"
        if self.changed:
            yield f"changed in another way, as training does: {', '.join(map(str, self.changed))}"
        if self.empty:
            yield f"with a head of zeros alone, such as a pruned one: {', '.join(map(str, self.empty))}"
        for match in self.matches:
            yield str(match)

    def to_dict(self) -> dict[str, Any]:
        """What was found, as JSON has it: sites by their names, the directions by their ranks."""
        kept = {} if self.subspace is None else self.subspace.ranks
        return {
            "checkpoint": self.checkpoint, "n_sites": self.n_sites, "margin": self.margin,
            "projections": {
                str(site): {"ranks": ranks, "strength": self.strengths[site], "centred": site in self.subspace.offset}
                for site, ranks in sorted(kept.items())
                if self.subspace is not None
            },
            "changed": [*map(str, self.changed)], "empty": [*map(str, self.empty)],
            "matches": [{**vars(match), "is_same": match.is_same} for match in self.matches],
        }  # fmt: skip

    def _projections(self, kept: Subspace) -> Iterator[str]:
        yield f"a projection at {len(kept.sites)} of {self.n_sites} sites"
        for site, ranks in sorted(kept.ranks.items()):
            blocks = "per head" if len(ranks) > 1 else "one block"
            centred = ", around a point that is not the origin" if site in kept.offset else ""
            strength = f", strength {self.strengths[site]:.3g}" if self.strengths[site] < 0.995 else ""
            width = kept.bases[site].shape[1]
            yield f"{site}: ranks {'/'.join(map(str, ranks))} of {width}, {blocks}{centred}{strength}"


def detect(
    checkpoint: str | Path,
    base: str | Path | None = None,
    *,
    kinds: Sequence[str] = ("k", "v"),
    subspaces: Mapping[str, Subspace] | None = None,
) -> Detection:
    """Look for folded projections in a checkpoint's files, layer by layer; no model is made.

    Without a base a projection of full strength shows as a lack of rank in a head's weights, or in those of all heads
    together where it was joint. With the base, from which the checkpoint was made, it shows as a change `-s (I - P) W`,
    and weaker ones show too. Adapters are not folded, and quantisation rounds a projection away: neither is found.

    Args:
        checkpoint: A model directory or hub name.
        base: The model that it was made from; None: it is not at hand.
        kinds: Which sites are looked at, of `KINDS`.
        subspaces: Known subspaces by name, to compare what is found with.

    Raises:
        SPDError: a checkpoint that cannot be read, is quantised or has no K and V; a base of another shape; another
            kind.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise SPDError(f"no weight holds a projection at {unknown[0]!r}; choose kinds from {', '.join(KINDS)}")
    stored, reference = StoredLayers(checkpoint), None if base is None else StoredLayers(base)
    found: dict[Site, _Kept] = {}
    changed: list[Site] = []
    empty: list[Site] = []
    margins, n_sites = [float("inf")], 0
    for site in (Site(layer, kind) for layer in range(stored.n_layers) for kind in kinds):
        layer = stored.at(site)
        if layer is None:  # a block without attention
            continue
        n_sites += 1
        if not layer.weight.flatten(1).any(dim=1).all():
            empty.append(site)
        kept = _in_rank(layer) if reference is None else _from_base(layer, _same_shape(reference, site, layer))
        if kept.bases:
            found[site] = kept
        elif kept.is_change:
            changed.append(site)
        margins.append(kept.margin)
    subspace = None
    if found:
        offset = {site: kept.offset for site, kept in found.items() if kept.offset is not None}
        bases = {site: kept.bases for site, kept in found.items()}
        subspace = Subspace.from_blocks(bases, offset=offset, origin={"detected in": Path(checkpoint).name})
    matches = tuple(_match(name, known, subspace) for name, known in (subspaces or {}).items() if subspace)
    strengths = {site: kept.strength for site, kept in found.items()}
    return Detection(
        str(checkpoint), subspace, strengths, tuple(changed), tuple(empty), n_sites, min(margins), matches
    )  # fmt: skip


class _Kept(NamedTuple):
    """What one site's weights show."""

    bases: list[Float[Tensor, "width rank"]]
    """A basis for each block; empty where there is no projection."""
    margin: float = float("inf")
    offset: Float[Tensor, "block width"] | None = None
    strength: float = 1.0
    is_change: bool = False


def _same_shape(reference: StoredLayers, site: Site, layer: StoredLayer) -> StoredLayer:
    other = reference.at(site) if site.layer < reference.n_layers else None
    if other is None or other.weight.shape != layer.weight.shape:
        raise SPDError(f"{reference.name} has no weights of the same shape at {site}: it is not the base; give another")
    return other


def _in_rank(layer: StoredLayer) -> _Kept:
    """A projection by what the weights lack: of each head, or where no head lacks anything, of all together."""
    margin = float("inf")
    for blocks in _blockings(layer.weight):
        width, other = blocks.shape[1:]
        if other < width:  # the rank is limited by what the layer reads
            continue
        vectors, values, _ = torch.linalg.svd(blocks.double(), full_matrices=False)
        zero = torch.stack([zero_below(block) for block in blocks])
        ranks = (values > zero[:, None]).sum(dim=1).tolist()
        told = [_stands_out(*block) for block in zip(blocks, values, zero, ranks, strict=True)]
        ranks = [rank if apart else width for rank, apart in zip(ranks, told, strict=True)]
        if any(0 < rank < width for rank in ranks):  # a head of zeros alone is pruned, or was never used
            split = [own.tensor_split([rank], dim=1) for own, rank in zip(vectors, ranks, strict=True)]
            kept, removed = ([parts[i] for parts in split] for i in (0, 1))
            return _Kept(kept, offset=None if layer.bias is None else _outside(layer.bias, removed))
        if _is_wide(blocks[0]):
            margin = min([margin, *(values[:, -1] / zero)[zero > 0].tolist()])
    return _Kept([], margin)


def _blockings(weight: Float[Tensor, "head d_head other"]) -> list[Float[Tensor, "block width other"]]:
    """The blocks that a projection may have: the heads, or all of them as one."""
    return [weight] if len(weight) == 1 else [weight, weight.flatten(0, 1)[None]]


def _stands_out(weight: Tensor, values: Float[Tensor, " width"], zero: Tensor, rank: int) -> bool:
    """Whether the singular values below `zero` are apart from the others, and more than chance puts there."""
    n_zero = len(values) - rank
    if not n_zero or not rank:
        return True
    # of a square matrix of random numbers about `zero √width / rms` singular values are that small
    by_chance = (
        0.0 if _is_wide(weight) else 3 + 2 * float(zero * len(values) ** 0.5 / weight.double().square().mean().sqrt())
    )
    return n_zero > by_chance and bool(values[rank - 1] >= GAP * values[rank])


def _is_wide(weight: Float[Tensor, "width other"]) -> bool:
    """Whether it has so many more columns than rows that random numbers give no small singular value."""
    return weight.shape[1] >= 1.5 * weight.shape[0]


def _outside(
    bias: Float[Tensor, "head d_head"], removed: Sequence[Tensor], expected: Tensor | None = None
) -> Float[Tensor, "block width"] | None:
    """What the biases have in the directions that were removed, beyond what is expected there (0): the point that the
    projection leaves in place. None where it is no more than rounding."""
    biases = bias.reshape(len(removed), -1)
    more = biases.double() if expected is None else biases.double() - expected
    outside = torch.stack([own @ (own.T @ one) for own, one in zip(removed, more, strict=True)])
    rounding = _rounding(biases).sum(dim=1).sqrt()
    return outside if bool((outside.norm(dim=1) > 4 * rounding).any()) else None


def _from_base(layer: StoredLayer, base: StoredLayer) -> _Kept:
    """A projection by the change from the base: `-s (I - P) W`, of each head or of all together."""
    for now, before in zip(_blockings(layer.weight), _blockings(base.weight), strict=True):
        change, was = before.double() - now.double(), before.double()
        zero = torch.stack([zero_below(a) + zero_below(b) for a, b in zip(now, before, strict=True)])
        vectors, values, _ = torch.linalg.svd(change, full_matrices=False)
        n_removed = (values > zero[:, None]).sum(dim=1).tolist()
        if not any(n_removed):
            return _Kept([])
        removed = [own[:, :n] for own, n in zip(vectors, n_removed, strict=True)]
        reached = [own @ (own.T @ weight) for own, weight in zip(removed, was, strict=True)]
        strengths, unexplained = [], []
        for own, full in zip(change, reached, strict=True):
            if full.any():
                strengths.append(float((own * full).sum() / full.square().sum()))
                unexplained.append(float((own - strengths[-1] * full).norm() / own.norm()))
        strength = sum(strengths) / len(strengths) if strengths else 0.0
        same = all(abs(one - strength) <= EXPLAINED for one in strengths) and 0 < strength < 1 + EXPLAINED
        keeps = any(own.shape[1] < own.shape[0] for own in removed)  # weights that were only scaled keep nothing
        if same and keeps and max(unexplained) <= EXPLAINED:
            kept = [rest(own) for own in removed]
            return _Kept(kept, offset=_moved(layer, base, removed, strength), strength=strength)
    return _Kept([], is_change=True)


def _moved(layer: StoredLayer, base: StoredLayer, removed: Sequence[Tensor], strength: float) -> Tensor | None:
    """The point that a projection of this strength leaves in place, by the change of the biases."""
    if layer.bias is None or base.bias is None:
        return None
    before = base.bias.double().reshape(len(removed), -1)
    outside = _outside(layer.bias, removed, (1 - strength) * before)
    return None if outside is None else outside / strength


def zero_below(weight: Float[Tensor, "width other"]) -> Float[Tensor, ""]:
    """What the singular values of a matrix of rounding errors stay below, for weights rounded as these are; float64.

    Rounding to nearest changes an entry by an error that is uniform over the spacing of its dtype there. A matrix of
    independent errors has a norm of about its largest row norm plus its largest column norm (Bandeira and van Handel
    2016); twice that is never reached by chance, and leaves room for sums in another order.
    """
    variance = _rounding(weight)
    return 2 * (variance.sum(dim=1).max().sqrt() + variance.sum(dim=0).max().sqrt())


def _rounding(weight: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    """The variance of each entry's rounding error, float64: `spacing² / 12`.

    The dtype is the narrowest that holds all entries as they are: weights that were computed in bfloat16 and stored in
    float32 have bfloat16's errors.
    """
    wide = weight.double()
    narrow = [dtype for dtype in (torch.bfloat16, torch.float16) if torch.equal(weight.to(dtype).double(), wide)]
    eps = torch.finfo(narrow[0] if narrow else weight.dtype).eps
    spacing = eps * torch.exp2(torch.frexp(wide).exponent.double() - 1)
    return torch.where(wide == 0, 0.0, spacing).square() / 12


def _match(name: str, known: Subspace, found: Subspace) -> Match:
    """Compare a known subspace with the one that was found."""
    both = [site for site in found.sites if site in known.bases]
    shared = [site for site in both if known.bases[site].shape[:2] == found.bases[site].shape[:2]]
    together = [(a, b) for site in shared for a, b in zip(known.blocks(site), found.blocks(site), strict=True)]
    least = sum(min(a.shape[1], b.shape[1]) for a, b in together)
    same = bool(shared) and set(shared) == set(found.sites) == set(known.sites)
    same = same and all(a.shape == b.shape for a, b in together) and set(known.offset) == set(found.offset)
    if not least:
        return Match(name, len(shared), None, None, same)
    overlap = sum(float(squared_cosines(a, b)) for a, b in together) / least
    chance = sum(a.shape[1] * b.shape[1] / a.shape[0] for a, b in together) / least
    return Match(name, len(shared), overlap, chance, same)
