"""The loss of single tokens, in float64 and with little memory."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROWS = 32
"""How many rows of logits are in float64 at a time."""


def token_losses(logits: Float[Tensor, "row d_vocab"], targets: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """`-log p(z_t | z_<t)` in nats, in float64: in float32 the sum over a vocabulary is the largest error of a gradient
    (1e-4 for SmolLM2, of which 1e-5 are left)."""
    return _TokenLosses.apply(logits, targets)


class _TokenLosses(torch.autograd.Function):
    """A few rows at a time, so that float64 takes no more memory than float32 does otherwise."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses, slopes = [], []
        for some, wanted in zip(logits.split(ROWS), targets[:, None].split(ROWS), strict=True):
            log_p = some.double().log_softmax(dim=-1)
            losses.append(-log_p.gather(1, wanted)[:, 0])
            slope = log_p.exp_().scatter_add_(1, wanted, log_p.new_full(wanted.shape, -1.0))
            slopes.append(slope.to(torch.promote_types(logits.dtype, torch.float32)))
        ctx.dtype = logits.dtype
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (slopes,) = ctx.saved_tensors
        return (gradients[0][:, None].to(slopes.dtype) * slopes).to(ctx.dtype), None
