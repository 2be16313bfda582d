"""What a twin's own weights make of a direction: values through `W_O` and the unembedding, keys against queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from spd_lens.errors import SPDError
from spd_lens.models import Fingerprint, architecture, refuse_spread, site_layer
from spd_lens.sites import Site

Directions = Float[Tensor, "head d_head n"]
"""The columns are `n` directions of the keys or values of each KV head."""


@dataclass(frozen=True)
class Unembedding:
    """The final norm's gain and the unembedding: residual directions to logits, up to the norm's positive scale.

    The norm divides by the length of the whole residual stream, which one direction does not know: what comes out is
    proportional to the change of the logits that a small step along the direction makes where the residual stream
    itself does not lie along it.
    """

    weight: Float[Tensor, "d_vocab d_model"]
    gain: Float[Tensor, " d_model"]
    """It is measured and not read, since families differ in what they store (`w`, or `1 + w`)."""
    centred: bool
    """Whether the mean is taken out first, as LayerNorm does and RMSNorm does not."""

    @classmethod
    def of(cls, hf: Any) -> Unembedding:
        """Find both in a transformers model; `SPDError` where it has no final norm that is known here, or is spread
        over several devices."""
        refuse_spread(hf, "reading directions out", "analyse on a machine that holds the model, without device_map")
        head = hf.get_output_embeddings()
        decoder = hf.get_submodule(architecture(hf).blocks.rpartition(".")[0])  # what holds the list of blocks
        norm = next((getattr(decoder, name) for name in _FINAL_NORMS if hasattr(decoder, name)), None)
        if head is None or norm is None:
            raise SPDError(
                f"{type(hf).__name__} has no final norm and unembedding that this read-out knows "
                f"(one of {', '.join(_FINAL_NORMS)} and output embeddings); look at its key directions alone"
            )
        gain, centred = _gain(norm, head.weight)
        return cls(head.weight.detach(), gain, centred)

    def __call__(self, residual: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """Logits, float32 or better, with their mean over the vocabulary taken out: softmax does not see it."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        x = residual.to(self.weight.device, wide)
        x = x - x.mean(dim=-1, keepdim=True) if self.centred else x
        logits = (x * self.gain.to(wide)) @ self.weight.to(wide).T
        return logits - logits.mean(dim=-1, keepdim=True)


def written(hf: nn.Module, layer: int, directions: Directions) -> Float[Tensor, "head group n d_model"]:
    """What the attention output gains when a value moves by a direction, for each query head that reads it.

    KV head `j` serves the query heads `j·g ... (j+1)·g - 1` (grouped-query attention); each has its own columns of
    `W_O`, and each weights this by how much it attends to the token.

    Raises:
        SPDError: the architecture has no separate output projection, or normalises the attention's output.
    """
    shape = Fingerprint.of(hf)
    if hasattr(site_layer(hf, Site(layer, "resid")).module, "post_feedforward_layernorm"):  # Gemma 2 and 3, OLMo 2
        raise SPDError(
            f"{type(hf).__name__} normalises what attention writes, so a value direction has no fixed read-out; "
            "look at its key directions, or at values with hooks on the lens model"
        )
    reader = site_layer(hf, Site(layer, "z"))
    weight = reader.base.weight.detach()
    weight = weight.T if reader.transposed else weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    by_head = rearrange(
        weight.to(wide), "d_model (head group d_head) -> head group d_model d_head",
        head=shape.n_kv_heads, d_head=shape.d_head,
    )  # fmt: skip
    return einsum(
        by_head, directions.to(weight.device, wide),
        "head group d_model d_head, head d_head n -> head group n d_model",
    )  # fmt: skip


def matches(
    hf: nn.Module, layer: int, queries: Float[Tensor, "token q_head d_head"], directions: Directions
) -> Float[Tensor, "token head group n"]:
    """Cosine of each token's queries with key directions of the head they read, before RoPE.

    RoPE turns query and key by the same angle at the same position, so this is the score at relative position 0, and
    nearly that at any distance for the slowly turning dimensions; quickly turning ones may point anywhere. Where the
    model normalises queries and keys (Qwen3), the query is taken after its norm, and the direction after the gain.
    """
    heads = directions.shape[0]
    q, d = queries.double(), directions.double().to(queries.device)
    gains = [_qk_gain(hf, layer, name, directions.shape[1]) for name in ("q_norm", "k_norm")]
    if gains[0] is not None:
        q = q * gains[0].double()  # the norm's own division is by a positive number, which a cosine ignores
    if gains[1] is not None:
        d = d * gains[1].double()[None, :, None]
        d = d / d.norm(dim=1, keepdim=True).clamp_min(1e-30)
    q = q / q.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    grouped = rearrange(q, "token (head group) d_head -> token head group d_head", head=heads)
    return einsum(grouped, d, "token head group d_head, head d_head n -> token head group n")


_FINAL_NORMS = ("norm", "final_layernorm", "ln_f", "final_layer_norm")


def _qk_gain(hf: nn.Module, layer: int, name: str, d_head: int) -> Tensor | None:
    block = site_layer(hf, Site(layer, "resid")).module
    norm = next((module for path, module in block.named_modules() if path.rpartition(".")[2] == name), None)
    if norm is None:
        return None
    weight = getattr(norm, "weight", None)
    if weight is None or weight.shape != (d_head,):
        raise SPDError(
            f"{type(hf).__name__} normalises queries and keys over all heads at once, so a key direction of one head "
            "cannot be compared with queries; look at value directions"
        )
    gain, centred = _gain(norm, weight)
    if centred:
        raise SPDError(f"{type(hf).__name__} centres its queries and keys, which this read-out does not handle")
    return gain


@torch.no_grad()
def _gain(norm: nn.Module, like: Tensor) -> tuple[Float[Tensor, " width"], bool]:
    """A norm's gain per dimension, and whether it centres, found by putting vectors of known length and mean in."""
    width = like.shape[-1]
    signs = torch.ones(width, dtype=like.dtype, device=like.device)
    signs[1::2] = -1  # mean 0 and mean square 1 for an even width: only gain and bias act on it
    plus, minus = norm(signs[None, None])[0, 0], norm(-signs[None, None])[0, 0]
    shifted = norm((signs + 1)[None, None])[0, 0]
    centred = torch.allclose(shifted.double(), plus.double(), rtol=1e-2, atol=1e-2)
    return (plus - minus) / 2 * signs, centred
