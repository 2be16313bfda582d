"""`Subspace`: frozen orthonormal bases per site, callable on activations (paper Eq. 9-12)."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from spd_lens.errors import SPDError, plain, whole
from spd_lens.files import Schema, fitting, holding, load_tensors, save_tensors
from spd_lens.models import Fingerprint, check_whole, neutral, weights_digest, without_autocast
from spd_lens.sites import Site
from spd_lens.stats import Finding, Grade, grade
from spd_lens.subspaces.bases import (
    TOLERANCE,
    Basis,
    check_orthonormal,
    check_shape,
    random_basis,
    rest,
    shared,
    side_by_side,
    span,
)
from spd_lens.subspaces.findings import beside, still_stored
from spd_lens.subspaces.lora import write_lora

Rank = int | float

FORMAT = 2
"""Version of the file that `Subspace.save` writes. 1, of earlier versions, had no number and no provenance."""


@dataclass(frozen=True)
class Subspace:
    """The directions that are kept at each site.

    A site's activation `[..., head, d_head]` is read as `[..., block, width]`: per head, blocks are heads; joint, there
    is one block of all heads. The residual stream `[..., d_model]` is one block. `P = V_r V_rᵀ` (Eq. 10-11) is never
    stored: the bases are. Subspaces compose: `a | b` spans both, `a & b` is what they share, `~a` what `a` leaves out.
    """

    bases: Mapping[Site, Float[Tensor, "block width rank"]]
    """Orthonormal columns, float64; zero columns behind a block's rank."""
    ranks: Mapping[Site, tuple[int, ...]]
    """Rank of each block: what was asked for, or less where the gradients had fewer directions."""
    singular_values: Mapping[Site, Float[Tensor, "block width"]] = field(default_factory=dict)
    """All singular values of the stacked gradients `G` per block, descending (Eq. 9). Empty for made-up subspaces."""
    offset: Mapping[Site, Float[Tensor, "block width"]] = field(default_factory=dict)
    """Point that the projection leaves in place; absent for the paper's Eq. 12, the mean for a centred projection."""
    rank: Rank | None = None
    """The rank that was asked for: per block, an integer or a fraction of the width."""
    fingerprint: Fingerprint | None = None
    """The model it was extracted from; None fits every model of its shape."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Where it came from: loss, dtype and numbers of examples and tokens, or how it was drawn."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """The model, data and settings behind it, as far as they are known (`Experiment.provenance`): its name, revision
    and weights, the task with the sha256 of its data and of the calibration examples, span rule, protocol, versions of
    libraries. Empty where it was drawn or composed."""
    findings: tuple[Finding, ...] = ()
    """What was measured with it, and with others that were made in the same way; what is made of it has none."""

    def __post_init__(self) -> None:
        if not self.bases:
            raise SPDError("a subspace needs at least one site")
        for site, basis in self.bases.items():
            check_shape(basis, self.ranks.get(site, ()), f"the basis of site {site}")
        for what, values in (("offset", self.offset), ("singular values", self.singular_values)):
            for site, value in values.items():
                if site not in self.bases or value.shape != self.bases[site].shape[:2] or not value.isfinite().all():
                    raise SPDError(f"the {what} of site {site} must be finite numbers [block, width] of its basis")
        # one memory layout: products of strided tensors differ in the last bit, and a loaded subspace has none
        object.__setattr__(self, "bases", {site: basis.contiguous() for site, basis in self.bases.items()})

    @classmethod
    def from_blocks(
        cls, blocks: Mapping[Site, Sequence[Basis]], like: Subspace | None = None, **fields: Any
    ) -> Subspace:
        """The subspace of these bases, which may be of different rank from block to block.

        Args:
            blocks: The basis of each block of each site, `[width, rank]`.
            like: The subspace whose other attributes it takes over, where they are not among `fields`.
            fields: Other attributes, by name.
        """
        bases = {site: side_by_side(own) for site, own in blocks.items()}
        ranks = {site: tuple(block.shape[1] for block in own) for site, own in blocks.items()}
        fields |= {"bases": bases, "ranks": ranks}
        if like is None:
            return cls(**fields)
        # of other origin, it was not made from the same data
        unlike: dict[str, Any] = {"findings": (), **({"provenance": {}} if "origin" in fields else {})}
        return replace(like, **{**unlike, **fields})

    def blocks(self, site: Site) -> list[Basis]:
        """The basis of each block, without the zero columns behind its rank."""
        return [basis[:, :rank] for basis, rank in zip(self.bases[site], self.ranks[site], strict=True)]

    @property
    def sites(self) -> list[Site]:
        return sorted(self.bases)

    @property
    def per_head(self) -> bool:
        """Whether a site has a projector per head (a single-head model has one block either way)."""
        return any(basis.shape[0] > 1 for basis in self.bases.values())

    def __repr__(self) -> str:
        sites = ", ".join(f"{site}: {'/'.join(map(str, self.ranks[site]))}" for site in self.sites)
        width = next(iter(self.bases.values())).shape[1]
        shape = f"{'per head' if self.per_head else 'joint'}, width {width}, ranks {{{sites}}}"
        return f"Subspace({shape}, grade: {self.grade})"

    @property
    def grade(self) -> Grade:
        """How far the evidence reaches (docs/evidence.md): computed from `findings`, and given in no other way."""
        return grade(self.findings, self.digest() if self.findings else None)

    def with_findings(self, *findings: Finding) -> Subspace:
        """The same subspace with these findings beside those that it has."""
        return replace(self, findings=(*self.findings, *(one for one in findings if one not in self.findings)))

    def __call__(self, activation: Float[Tensor, "..."], site: Site, strength: float = 1.0) -> Float[Tensor, "..."]:
        """`(1 - s) x + s (μ + (x - μ) P)`, with `μ = 0` in the paper's Eq. 12.

        Computed in at least float32 and returned in the activation's dtype. Strength 0 returns the activation itself.
        """
        strength = plain(strength)
        if strength == 0.0:
            return activation
        basis = self.bases[site]
        wide = torch.promote_types(activation.dtype, torch.float32)
        basis = basis.to(activation.device, wide)
        x = activation.to(wide).reshape(*activation.shape[: -site.n_axes], basis.shape[0], basis.shape[1])
        mean = self.offset[site].to(x) if site in self.offset else None
        centred = x if mean is None else x - mean
        # x V first: two thin products cost 2·width·rank, forming P would cost width² per token
        with without_autocast(x.device.type):
            kept = einsum(centred, basis, "... block width, block width rank -> ... block rank")
            projected = einsum(kept, basis, "... block rank, block width rank -> ... block width")
        projected = projected if mean is None else projected + mean
        mixed = projected if strength == 1.0 else torch.lerp(x, projected, strength)
        return mixed.reshape(activation.shape).to(activation.dtype)

    def projector(self, site: Site) -> Float[Tensor, "block width width"]:
        """`P = V_r V_rᵀ` per block (Eq. 10-11), float64."""
        basis = self.bases[site]
        return basis @ basis.mT

    @neutral()
    def affine(
        self, site: Site, strength: float = 1.0
    ) -> tuple[Float[Tensor, "block width width"], Float[Tensor, "block width"]]:
        """The map `x -> x M + c`, float64: `M = (1 - s) I + s P`, which is symmetric, and `c = s μ (I - P)`."""
        strength = plain(strength)
        projector = self.projector(site)
        identity = torch.eye(projector.shape[-1], dtype=projector.dtype).expand_as(projector)
        mean = self.offset.get(site, torch.zeros(projector.shape[:2], dtype=projector.dtype)).double()
        constant = strength * einsum(mean, identity - projector, "block i, block i j -> block j")
        return torch.lerp(identity, projector, strength), constant

    def __getitem__(self, ranks: slice) -> Subspace:
        """`subspace[:16]`: the leading 16 directions of every block."""
        if not isinstance(ranks, slice) or ranks.start not in (None, 0) or ranks.step not in (None, 1):
            raise SPDError("slice a subspace by rank from the front, as in subspace[:16]")
        return self.truncate(ranks.stop) if ranks.stop is not None else self

    def truncate(self, rank: Rank) -> Subspace:
        """The leading directions alone: an integer per block or a fraction of its width; never more than it has."""
        rank, leading = plain(rank), {}
        for site, basis in self.bases.items():
            limit = resolve_rank(rank, basis.shape[1])
            leading[site] = [block[:, :limit] for block in self.blocks(site)]
        return Subspace.from_blocks(leading, self, rank=rank)

    def select(self, sites: Iterable[Site]) -> Subspace:
        """Some of its sites."""
        chosen = list(sites)
        for site in chosen:
            if site not in self.bases:
                raise SPDError(f"the subspace has no site {site}; it has {', '.join(map(str, self.sites))}")
        parts: dict[str, Any] = {}
        for name in ("bases", "ranks", "singular_values", "offset"):
            parts[name] = {site: value for site, value in getattr(self, name).items() if site in chosen}
        return replace(self, **parts, findings=())

    @neutral()
    def random_like(self, seed: int) -> Subspace:
        """Uniformly random directions with the same blocks and ranks: the control that any claim needs beside it."""
        seed = whole("seed", seed, least=None)
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for site in self.sites:  # in a fixed order, so that a seed names one subspace
            width = self.bases[site].shape[1]
            drawn[site] = [random_basis(width, rank, generator) for rank in self.ranks[site]]
        return Subspace.from_blocks(drawn, self, singular_values={}, origin={"random": seed})

    @neutral()
    def union(self, other: Subspace, tolerance: float = TOLERANCE) -> Subspace:
        """The span of both, block by block; `a | b` is the same with the default tolerance.

        A site that only one of them projects is kept whole by the other, so the union leaves it alone: the result has
        the sites they share. To weigh two domains by their gradients instead, add their moments.

        Raises:
            SPDError: different blocks or means, different models, or no site in common.
        """
        if not set(self.bases) & set(other.bases):
            raise SPDError("the two subspaces have no site in common, so their union keeps everything; nothing is left")
        spans = {}
        for site, pairs in self._beside(other).items():
            spans[site] = [span(torch.cat(pair, dim=1), tolerance) for pair in pairs]
        return self._composed(other, spans, "union")

    @neutral()
    def intersection(self, other: Subspace, tolerance: float = TOLERANCE) -> Subspace:
        """The directions that both hold, block by block; `a & b` is the same with the default tolerance.

        A direction counts as shared if some direction of the other is within `tolerance` radians; the result holds the
        bisector of the two. Half-rank subspaces of different origin share none exactly: give the angle that you would
        call the same. A site that only one of them projects keeps that one's directions. Blocks may end up with rank 0,
        which removes their activation altogether; `ranks` says where.

        Raises:
            SPDError: different blocks or means, or different models.
        """
        if not 0.0 <= tolerance < torch.pi / 2:
            raise SPDError(
                f"tolerance {tolerance} is no angle between 0 and pi/2 radians; give a small one such as 0.1"
            )
        spans = {site: self.blocks(site) for site in self.bases} | {site: other.blocks(site) for site in other.bases}
        for site, pairs in self._beside(other).items():
            spans[site] = [shared(mine, theirs, tolerance) for mine, theirs in pairs]
        return self._composed(other, spans, "intersection")

    @neutral()
    def complement(self) -> Subspace:
        """What it leaves out, block by block: the projector is `I - P`, around the same mean if there is one; `~a`."""
        spans = {site: [rest(block) for block in self.blocks(site)] for site in self.sites}
        origin = {"complement": dict(self.origin)}
        return Subspace.from_blocks(spans, self, singular_values={}, rank=None, origin=origin)

    def __or__(self, other: Subspace) -> Subspace:
        return self.union(other) if isinstance(other, Subspace) else NotImplemented

    def __and__(self, other: Subspace) -> Subspace:
        return self.intersection(other) if isinstance(other, Subspace) else NotImplemented

    def __invert__(self) -> Subspace:
        return self.complement()

    def _beside(self, other: Subspace) -> dict[Site, list[tuple[Basis, Basis]]]:
        """The bases of both, block by block, at the sites they share; `SPDError` if they do not fit together."""
        if self.fingerprint is not None and other.fingerprint is not None:
            self.fingerprint.check(other.fingerprint, "the first of the two subspaces")
        pairs = {}
        for site in (site for site in self.sites if site in other.bases):
            mine, theirs = self.bases[site].shape[:2], other.bases[site].shape[:2]
            if mine != theirs:
                raise SPDError(
                    f"at site {site} one subspace has {mine[0]} blocks of width {mine[1]} and the other {theirs[0]} of "
                    f"{theirs[1]}; make both per head or both joint"
                )
            means = [one.offset[site] for one in (self, other) if site in one.offset]
            if len(means) == 1 or (means and not torch.equal(*means)):
                raise SPDError(
                    f"the subspaces are centred differently at site {site}, so they are not composed; centre neither, "
                    "or add their moments and centre the sum"
                )
            pairs[site] = list(zip(self.blocks(site), other.blocks(site), strict=True))
        return pairs

    def _composed(self, other: Subspace, spans: Mapping[Site, Sequence[Basis]], how: str) -> Subspace:
        means = {**other.offset, **self.offset}
        return Subspace.from_blocks(
            spans,
            self,
            singular_values={},
            offset={site: means[site] for site in spans if site in means},
            rank=None,
            fingerprint=self.fingerprint or other.fingerprint,
            origin={how: [dict(self.origin), dict(other.origin)]},
        )

    @neutral()
    def check(self, model: nn.Module) -> None:
        """Raise `SPDError` if this is not a subspace of `model` (lens model or twin), or none at all."""
        mine = Fingerprint.of(model)
        if self.fingerprint is not None:
            self.fingerprint.check(mine, "the subspace")
        for site, basis in self.bases.items():
            n_heads, d_head = mine.heads_at(site)
            width = n_heads * d_head
            fits = basis.shape[0] * basis.shape[1] == width and basis.shape[0] in (1, n_heads)
            if site.layer >= mine.n_layers or not fits:
                raise SPDError(
                    f"the subspace's site {site} with {basis.shape[0]} blocks of width {basis.shape[1]} does not exist "
                    f"in this model of {mine.n_layers} layers and width {width}; extract it again from this model"
                )
        self._check_orthonormal()

    def _check_orthonormal(self) -> None:
        for site, basis in self.bases.items():
            check_orthonormal(basis, self.ranks[site], f"the basis of site {site}")

    def foldable(self, site: Site) -> bool:
        """Whether the projection at a site can be written into one linear layer.

        The residual stream is read by several layers through a norm; the mean of a centred projection of `z` would have
        to pass through `W_O` and through any adapter on it. There the twin gets a hook instead, which does the same.
        """
        return site.kind in ("k", "v", "q") or (site.kind == "z" and site not in self.offset)

    def check_foldable(self, what: str) -> None:
        """Raise `SPDError` if `what`, which holds weights alone, cannot hold the projection."""
        for site in self.sites:
            if not self.foldable(site):
                raise SPDError(
                    f"the projection at site {site} cannot be written into the weights of one layer, so {what} "
                    "cannot hold it; use folded() or projected(), or a subspace of k and v"
                )

    @neutral()
    def to_lora(self, hf: PreTrainedModel, directory: str | Path, *, strength: float = 1.0) -> Path:
        """Write the projection as a LoRA adapter in PEFT's format, for any engine that serves LoRA adapters.

        A projection changes the weight of a linear layer by a matrix of low rank: `P W - W = -(I - P) W = B A`, with an
        orthonormal basis of what the subspace leaves out as the columns of `B`, and `A = -Bᵀ W`. So the adapter is the
        projection exactly, up to float32: it is not trained. Its rank at a layer is the number of directions left out
        there, `n_kv_heads (d_head - r)` for keys alone; `lora_alpha` over the rank is the strength. A bias of the layer
        and the mean of a centred projection go into PEFT's LoRA bias, which some engines do not take (`vllm_note`).

        Beside a trained adapter (`set_adapter([...])`) the changes add up: what the trained one adds is not projected.
        For the projection of the tuned model, give the model that `load` makes of the trained adapter's directory.

        Args:
            hf: The twin whose weights `W` are; left as it was. The adapter fits these weights and no others.
            directory: The adapter's directory, which must be empty or not there yet.
            strength: How strongly to project, from 0 to 1.

        Returns:
            `directory`, with PEFT's two files and `projection.json`, which says what it was made of.

        Raises:
            SPDError: the directory is not empty; the subspace is of another model, holds a site that no weight can hold
                (`foldable`), or keeps everything; the model carries an adapter.
        """
        strength = check_strength(strength)
        check_whole(hf)
        self.check(hf)
        self.check_foldable("an adapter")
        removed = {site: torch.block_diag(*map(rest, self.blocks(site))) for site in self.sites}
        constants = {site: self.affine(site)[1].flatten() for site in self.sites}
        origin = {"subspace": self.digest(), "model": hf.name_or_path, "weights": weights_digest(hf)}
        return write_lora(hf, directory, removed, constants, strength, origin)

    def explore(self, moments: Any = None, *, others: Mapping[str, Any] | None = None) -> Any:
        """Spectra, energies and overlaps with `others`, as one page in a notebook: `analysis.dashboard.explore`."""
        # found by name when asked for: the library does not depend on its analyses
        return importlib.import_module("spd_lens.analysis.dashboard").explore(self, moments, others=others)

    def digest(self) -> str:
        """Names it by the numbers that act, its bases and offsets: a short hexadecimal text."""
        digest = hashlib.blake2b(digest_size=8)
        for site in self.sites:
            for part in (self.bases, self.offset):
                if site in part:
                    digest.update(f"{site} {tuple(part[site].shape)}".encode())
                    digest.update(part[site].detach().double().cpu().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, which says what it is and where it comes from (docs/sharing.md)."""
        tensors = {f"basis.{site}": basis for site, basis in self.bases.items()}
        tensors |= {f"singular_values.{site}": values for site, values in self.singular_values.items()}
        tensors |= {f"offset.{site}": mean for site, mean in self.offset.items()}
        header = {
            "format": FORMAT,
            "written_by": f"spd_lens {importlib.metadata.version('spd_lens')}",
            "ranks": {str(site): list(ranks) for site, ranks in self.ranks.items()},
            "rank": self.rank,
            "fingerprint": self.fingerprint.to_dict() if self.fingerprint else None,
            "origin": dict(self.origin),
            "provenance": dict(self.provenance),
            "grade": str(self.grade),
            **({"findings": [finding.to_dict() for finding in self.findings]} if self.findings else {}),
        }
        return save_tensors(path, "a subspace", tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Subspace:
        """Read what `save` wrote, and `findings.json` beside it.

        The grade that the file names is for its readers: `grade` is computed again from the findings.

        Raises:
            SPDError: the file is missing, damaged, something else, or of a newer format than this version reads.
        """
        tensors, header = load_tensors(path, "a subspace")
        if isinstance(form := header.get("format", 1), int) and form > FORMAT:
            raise SPDError(
                f"{path} is a subspace of format {form}, written by {header.get('written_by', 'a newer version')}, "
                f"and this version of spd_lens reads formats up to {FORMAT}; upgrade spd_lens"
            )

        def part(name: str) -> dict[Site, Tensor]:
            prefix = f"{name}."
            return {Site.parse(key.removeprefix(prefix)): v for key, v in tensors.items() if key.startswith(prefix)}

        of = fitting(_Header, header, path)
        with holding(path, "a subspace"):
            own = tuple(still_stored(map(Finding.from_dict, of.findings), Path(path).parent))
            found = cls(
                bases=part("basis"),
                ranks={Site.parse(site): tuple(ranks) for site, ranks in of.ranks.items()},
                singular_values=part("singular_values"),
                offset=part("offset"),
                rank=of.rank,
                fingerprint=None if of.fingerprint is None else Fingerprint.from_dict(of.fingerprint, path),
                origin=of.origin,
                provenance=of.provenance,
            )
            found._check_orthonormal()
        return found.with_findings(*own, *beside(path))


class _Header(Schema, extra="ignore"):
    """What stands in the file of a subspace beside its tensors."""

    ranks: dict[str, list[int]]
    rank: int | float | None
    fingerprint: dict[str, Any] | None
    origin: dict[str, Any]
    format: int = 1
    provenance: dict[str, Any] = {}
    findings: list[Any] = []


def check_strength(strength: float) -> float:
    """The strength as Python's own number; `SPDError` unless it is one from 0 to 1."""
    strength = plain(strength)
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0.0 <= strength <= 1.0:
        raise SPDError(f"strength {strength!r} is not between 0 (identity) and 1 (full projection)")
    return strength


def resolve_rank(rank: Rank, width: int) -> int:
    """Directions per block: an integer as it is, a fraction of the width rounded down but at least 1.

    Raises `SPDError` for 0, a negative number, or more than the width.
    """
    rank = plain(rank)
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise SPDError(f"rank {rank!r} is neither an integer nor a fraction")
    if isinstance(rank, float):
        if not 0.0 < rank <= 1.0:
            raise SPDError(f"rank {rank} is no fraction in (0, 1]; write an integer for a number of directions")
        return max(1, int(rank * width + 1e-9))
    if not 1 <= rank <= width:
        raise SPDError(f"rank {rank} is not between 1 and the block's width of {width}")
    return rank
