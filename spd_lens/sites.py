"""`Site`: one hook point that is captured and projected, and the choice of layers (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spd_lens.errors import SPDError, plain

KINDS: tuple[str, ...] = ("k", "v", "q", "z", "resid")
"""The activations that can be captured and projected. The paper uses keys and values (Eq. 7, 12); queries, the heads'
outputs before `W_O` and the residual stream behind a block are for comparison."""

LAYER_WORDS: Mapping[str, Callable[[int], list[int]]] = {
    "last_mid": lambda n_layers: [max(n_layers // 2 - 1, 0), n_layers - 1],
    "last_mid_from_0": lambda n_layers: [n_layers // 2, n_layers - 1],
    "all": lambda n_layers: list(range(n_layers)),
}
"""Choices of layers by name, as block indices of a model with so many blocks: see `resolve_layers`."""


@dataclass(frozen=True, order=True)
class Site:
    """An activation of one attention layer, named as TransformerLens names it."""

    layer: int
    """Block index, counted from 0 (the paper counts layers from 1)."""
    kind: str
    """One of `KINDS`."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SPDError(f"unknown kind {self.kind!r}; choose from {', '.join(KINDS)}")

    @property
    def hook_name(self) -> str:
        """`blocks.{layer}.attn.hook_{kind}`: `[batch, pos, head, d_head]`, for k and q before RoPE, for k and v before
        GQA expansion. `resid`: `blocks.{layer}.hook_resid_post`, `[batch, pos, d_model]`."""
        if self.kind == "resid":
            return f"blocks.{self.layer}.hook_resid_post"
        return f"blocks.{self.layer}.attn.hook_{self.kind}"

    @property
    def n_axes(self) -> int:
        """How many trailing axes of the activation are one token's: head and `d_head`, or `d_model`."""
        return 1 if self.kind == "resid" else 2

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """The inverse of `str(site)`: `"11.k"` is `Site(11, "k")`."""
        layer, _, kind = text.partition(".")
        if not layer.isdecimal():
            raise SPDError(f"{text!r} does not name a site; write a layer and a kind, as in '11.k'")
        return cls(int(layer), kind)


def resolve_layers(layers: str | int | Iterable[int], n_layers: int) -> list[int]:
    """Block indices, counted from 0, in ascending order.

    `"last_mid"` is the paper's default {L, ⌊L/2⌋} counted from 1, which are the blocks `n_layers - 1` and
    `n_layers // 2 - 1`. `"last_mid_from_0"` takes {L, ⌊L/2⌋} as the reference code does (github.com/gh540-svg/hahaha,
    commit e249fec), whose middle block is `n_layers // 2` counted from 0: one block further. `"all"` is every block;
    otherwise block indices as given.
    """
    if isinstance(layers, str):
        if layers in LAYER_WORDS:
            return sorted(set(LAYER_WORDS[layers](n_layers)))
        parts = [part.strip() for part in layers.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise SPDError(f"unknown layers {layers!r}; write {_WORDS} or block indices such as '14,29'")
        layers = [int(part) for part in parts]
    chosen: Any = plain(list(layers) if isinstance(layers, Iterable) and not hasattr(layers, "ndim") else layers)
    chosen = chosen if isinstance(chosen, list) else [chosen]
    if not chosen:
        raise SPDError(f"no layer was chosen; write {_WORDS} or at least one block index")
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < n_layers:
            raise SPDError(f"layer {layer!r} does not exist: the model has blocks 0 to {n_layers - 1} (counted from 0)")
    return sorted(set(chosen))


_WORDS = ", ".join(map(repr, LAYER_WORDS))


def resolve_sites(layers: str | int | Iterable[int], kinds: str | Sequence[str], n_layers: int) -> list[Site]:
    """All sites of the chosen layers and kinds, ordered by layer, then as the kinds were given."""
    kinds = [kind.strip() for kind in kinds.split(",")] if isinstance(kinds, str) else list(kinds)
    if not kinds:
        raise SPDError(f"no kind was chosen; choose from {', '.join(KINDS)}")
    return [Site(layer, kind) for layer in resolve_layers(layers, n_layers) for kind in dict.fromkeys(kinds)]
