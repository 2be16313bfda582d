"""What the query heads of each KV group attend to on one example, small enough to go into a page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from spd_lens.analysis.common import pieces_of, spelled, tokens_of
from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.models import Loss, ModelPair, neutrally
from spd_lens.subspaces import token_gradients

_MAX_BYTES = 6_000_000
"""Most bytes that all patterns of a page take together; base64 adds a third."""


@dataclass(frozen=True)
class Attention:
    """Patterns and gradient norms of one example."""

    example: Example
    tokens: list[str]
    scored: list[int]
    """Positions of the tokens in S."""
    rows: list[int]
    """Destination positions whose patterns are kept: those at which the completion is predicted."""
    pattern: UInt8[np.ndarray, "layer head row pos"]
    """Attention times 255, of query heads."""
    gradient: dict[str, Float[Tensor, "head pos"]]
    """Gradient norm of each KV head at each token, by site, such as `"14.k"`."""
    group: int
    """Query heads per KV head."""

    def record(self) -> dict[str, Any]:
        """All of it as plain values for a page, with arrays as base64 of their bytes."""
        largest = {key: g.amax(dim=1).clamp_min(1e-300) for key, g in self.gradient.items()}
        return {
            "id": self.example.id,
            "tokens": self.tokens,
            "scored": self.scored,
            "rows": self.rows,
            "group": self.group,
            "pattern": [[_bytes(head) for head in layer] for layer in self.pattern],
            "gradient": {
                key: [_bytes((255 * g[j] / largest[key][j]).round().to(torch.uint8).numpy()) for j in range(len(g))]
                for key, g in self.gradient.items()
            },
        }


@neutrally
def attention_patterns(
    pair: ModelPair, ids: Sequence[int], layers: Sequence[int]
) -> Float[Tensor, "layer head dest source"]:
    """The lens model's attention patterns (`hook_pattern`) on one sequence, float32 on the CPU.

    Raises:
        SPDError: no lens model agrees with the twin at that length, or it has no such hook points.
    """
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
    lens = pair.lens_at(len(ids))
    for name in names:
        if name not in lens.hook_dict:
            raise SPDError(f"the lens model has no hook point {name}, so its attention cannot be shown")
    tokens = torch.tensor([list(ids)], device=pair.device)
    with torch.no_grad():
        _, cache = lens.run_with_cache(tokens, names_filter=lambda name: name in names)
    return torch.stack([cache[name][0].float().cpu() for name in names])


@neutrally
def attention_of(
    pair: ModelPair,
    examples: Sequence[Example],
    id: str | None = None,
    *,
    kinds: Sequence[str] = ("k", "v"),
    loss: Loss = "aligned",
) -> Attention:
    """Attention and gradient norms of all heads on the example called `id`, or on the shortest one.

    Of long examples or many heads, only the last destinations are kept, so that the page stays small.
    """
    named = examples if id is None else [example for example in examples if example.id == id]
    if not named:
        raise SPDError(f"no calibration example is called {id!r}; one is called {examples[0].id!r}")
    example = min(named, key=lambda one: len(pair.encode(one, loss).ids))
    encoded = pair.encode(example, loss)
    pattern = attention_patterns(pair, encoded.ids, range(pair.n_layers))
    first = max(min(encoded.completion_start, encoded.scored[0]) - 1, 0)
    last = max(encoded.scored)  # the last prediction is made right before it
    room = max(1, _MAX_BYTES // (pattern.shape[0] * pattern.shape[1] * pattern.shape[3]))
    rows = list(range(max(first, last - room), last))
    (found,) = token_gradients(pair, [example], layers="all", kinds=kinds, loss=loss, progress=False)
    heads = pair.fingerprint.n_kv_heads
    gradient = {
        str(site): g.cpu().unflatten(1, (heads, -1)).norm(dim=2).T
        for site, g in found.gradient.items() if site.kind in ("k", "v")
    }  # fmt: skip
    return Attention(
        example=example,
        tokens=[spelled(piece) for piece in tokens_of(pieces_of([example], pair.format, loss)[0])],
        scored=list(encoded.scored),
        rows=rows,
        pattern=(255 * pattern[:, :, rows]).round().clamp(0, 255).to(torch.uint8).numpy(),
        gradient=gradient,
        group=pair.fingerprint.n_heads // heads,
    )


def _bytes(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
