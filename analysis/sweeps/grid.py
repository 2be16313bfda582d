"""`Grid`: which ranks, layers, kinds and heads a sweep tries; `GridCell`: one combination of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from spd_lens.analysis.common import Estimated
from spd_lens.errors import SPDError
from spd_lens.runs import read_yaml, validated
from spd_lens.settings import Settings
from spd_lens.sites import KINDS, LAYER_WORDS, Site, resolve_layers
from spd_lens.subspaces import GradientMoments, Subspace, resolve_rank

PROJECTORS = ("per_head", "joint")
THIRDS = ("first_third", "middle_third", "last_third")


class Grid(Settings):
    """What to sweep: all combinations of the lists. Unknown keys are refused."""

    model_config = ConfigDict(allow_inf_nan=False)

    ranks: list[int | float] = Field(
        [0.0625, 0.125, 0.25, 0.5, 0.75],
        min_length=1,
        description="Directions per block: integers, or fractions of its width.",
    )
    layers: list[str] = Field(
        ["each/4", "last_mid", "all"],
        min_length=1,
        description=f"{', '.join((*LAYER_WORDS, *THIRDS))}, block indices such as 14,29; "
        "each is every layer by itself, each/4 every fourth, counted back from the last.",
    )
    kinds: list[str] = Field(["kv"], min_length=1, description="Kinds projected together: kv, k, v.")
    heads: list[str] = Field(["all"], min_length=1, description="all, each (one head at a time), or a head's number.")
    projectors: list[str] = Field(["per_head"], min_length=1, description="per_head, joint.")
    task: str | None = Field(None, description="Task of the held-out items; the run's source task if null.")
    n_items: int = Field(24, ge=4, description="Held-out items with gold completions.")
    n_random: int = Field(3, ge=3, le=100, description="Random subspaces of the same ranks beside every cell.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the random subspaces.")
    batch_tokens: int = Field(1024, ge=1, description="Padded tokens per batch.")

    @field_validator("layers", "heads", "kinds", "projectors", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        """`14`, `[14, 29]` and `"14,29"` are all fine as an entry, and one entry needs no list."""
        entries = value if isinstance(value, list | tuple) else [value]
        return [
            ",".join(map(str, entry)) if isinstance(entry, list | tuple) else str(entry).replace(" ", "")
            for entry in entries
        ]

    @field_validator("ranks", mode="before")
    @classmethod
    def _ranks(cls, value: Any) -> Any:
        ranks = value if isinstance(value, list | tuple) else [value]
        for rank in ranks:
            if isinstance(rank, bool) or not isinstance(rank, int | float):
                raise ValueError(f"rank {rank!r} is neither an integer nor a fraction of a block's width")
            if rank < 1 if isinstance(rank, int) else not 0 < rank <= 1:
                raise ValueError(f"rank {rank!r} is neither a number of directions from 1 on nor a fraction up to 1.0")
        return list(ranks)

    @field_validator("projectors", "kinds", "heads")
    @classmethod
    def _known(cls, value: list[str], info: ValidationInfo) -> list[str]:
        for name in value:
            if info.field_name == "projectors" and name not in PROJECTORS:
                raise ValueError(f"unknown projector {name!r}; choose from {', '.join(PROJECTORS)}")
            if info.field_name == "heads" and name not in ("all", "each") and not name.isdecimal():
                raise ValueError(f"unknown head {name!r}; write all, each or a head's number")
            if info.field_name == "kinds":
                split_kinds(name)
        return value

    @classmethod
    def make(cls, settings: dict[str, Any]) -> Grid:
        """A grid of these settings; `SPDError` names the first wrong one in a sentence."""
        return validated(cls, settings)

    @classmethod
    def read(cls, path: str | Path | None, defaults: dict[str, Any] | None = None, **over: Any) -> Grid:
        """The grid of a YAML file over `defaults`; values of `over` that are not None are over both."""
        given = {key: value for key, value in over.items() if value is not None}
        return cls.make({**(defaults or {}), **(read_yaml(path) if path is not None else {}), **given})

    def cells(self, moments: GradientMoments) -> list[GridCell]:
        """Every combination once, cheapest first (those that begin in late layers).

        A rank of a block's whole width is left out: it is the model itself.

        Raises:
            SPDError: A layer, kind, head or rank that the moments do not have.
        """
        found: dict[tuple[Any, ...], GridCell] = {}
        for label, blocks in self._layer_sets(moments.fingerprint.n_layers):
            for kinds in self.kinds:
                names = split_kinds(kinds)
                sites = tuple(Site(block, kind) for block in blocks for kind in names)
                label_of_kinds = ("" if all(len(kind) == 1 for kind in names) else "+").join(names)
                missing = [str(site) for site in sites if site not in moments.gradient]
                if missing:
                    raise SPDError(
                        f"the grid asks for site {missing[0]}, at which nothing was extracted; the moments have "
                        f"{', '.join(sorted({site.kind for site in moments.sites}))} of layers "
                        f"{moments.sites[0].layer} to {moments.sites[-1].layer}"
                    )
                for projector in self.projectors:
                    n_blocks = moments.n_heads[sites[0]] if projector == "per_head" else 1
                    width = moments.width(sites[0]) // n_blocks
                    for head, rank in product(self._heads_of(moments, sites, projector), self.ranks):
                        size = resolve_rank(rank, width)
                        if size < width:
                            cell = GridCell(label, sites, label_of_kinds, head, projector, size, width)
                            found.setdefault((sites, head, projector, size), cell)
        if not found:
            raise SPDError("the grid holds nothing but full ranks, which are the model itself; give smaller ranks")
        return sorted(found.values(), key=lambda cell: -cell.first_layer)

    def _layer_sets(self, n_layers: int) -> list[tuple[str, list[int]]]:
        sets: list[tuple[str, list[int]]] = []
        for entry in self.layers:
            if entry == "each" or entry.startswith("each/"):
                step = entry.partition("/")[2] or "1"
                if not step.isdecimal() or int(step) < 1:
                    raise SPDError(f"layers {entry!r} are not possible; write each, or each/4 for every fourth layer")
                sets += [(str(i), [i]) for i in sorted(range(n_layers - 1, -1, -int(step)))]
            elif entry in THIRDS:
                third = THIRDS.index(entry)
                chosen = list(range(third * n_layers // 3, (third + 1) * n_layers // 3))
                if not chosen:
                    raise SPDError(f"a model of {n_layers} layers has no {entry}; name its layers instead")
                sets.append((entry, chosen))
            else:
                sets.append((entry, resolve_layers(entry, n_layers)))
        return sets

    def _heads_of(self, moments: GradientMoments, sites: tuple[Site, ...], projector: str) -> list[str]:
        n_heads = min(moments.n_heads[site] for site in sites)
        heads: list[str] = []
        for entry in self.heads:
            if entry == "each":
                heads += map(str, range(n_heads))
            elif entry != "all" and int(entry) >= n_heads:
                raise SPDError(f"head {entry} does not exist: there are heads 0 to {n_heads - 1}")
            else:
                heads.append(entry)
        # a joint projector mixes heads, so it has none by itself
        return [head for head in heads if head == "all" or projector == "per_head"]


@dataclass(frozen=True)
class GridCell:
    """One subspace of a grid."""

    layers: str
    """The layers, as the grid names them."""
    sites: tuple[Site, ...]
    kinds: str
    head: str
    """`"all"`, or the one head that is projected while the others stay as they are."""
    projector: str
    rank: int
    """Directions per block that were asked for."""
    width: int
    """Width of a block."""

    @property
    def name(self) -> str:
        """Its name in files and tables, made of its blocks: their label may be spelled differently in two grids."""
        blocks = sorted({site.layer for site in self.sites})
        spans = len(blocks) > 2 and blocks == list(range(blocks[0], blocks[-1] + 1))
        where = f"{blocks[0]}-{blocks[-1]}" if spans else "+".join(map(str, blocks))
        return f"L{where}.{self.kinds}.{self.head}.{self.projector}.r{self.rank}"

    @property
    def first_layer(self) -> int:
        """Below this layer the projected model does what the model does."""
        return min(site.layer for site in self.sites)

    @property
    def family(self) -> tuple[str, str, str, str]:
        """What it shares with the cells that differ from it in rank alone."""
        return self.layers, self.kinds, self.head, self.projector

    def subspace(self, moments: GradientMoments, *, center: bool = False, center_gradients: bool = False) -> Subspace:
        """Its subspace by the paper's estimator."""
        full = moments.subspace(
            self.rank, per_head=self.projector == "per_head", sites=self.sites, center_gradients=center_gradients,
            center=center,
        )  # fmt: skip
        return self._of_head(full)

    def estimated(self, subspaces: Estimated) -> Subspace:
        """Its subspace by whatever estimator."""
        return self._of_head(subspaces(self.rank, self.sites, per_head=self.projector == "per_head"))

    def _of_head(self, full: Subspace) -> Subspace:
        """Where one head alone is projected, all directions of the others are kept."""
        if self.head == "all":
            return full
        blocks = {}
        for site in full.sites:
            whole = torch.eye(full.bases[site].shape[1], dtype=torch.float64)
            blocks[site] = [own if i == int(self.head) else whole for i, own in enumerate(full.blocks(site))]
        return Subspace.from_blocks(blocks, full)


def split_kinds(kinds: str) -> list[str]:
    """`"kv"` is k and v together; a longer kind is named by itself, and `"k+v"` is `"kv"`."""
    chosen = [kinds] if kinds in KINDS else kinds.split("+") if "+" in kinds else list(kinds)
    for kind in chosen:
        if kind not in KINDS:
            raise ValueError(
                f"unknown kinds {kinds!r}; write those of {', '.join(KINDS)} to project together, as in kv"
            )
    return list(dict.fromkeys(chosen))
