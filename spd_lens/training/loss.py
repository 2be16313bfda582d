"""Next-token loss without the logits of a whole batch: a few scored positions at a time, gradient and all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from spd_lens.models import run_twin, unembed_only

IGNORED = -100
"""Label of a position without loss, by PyTorch's convention."""

_CHUNK_BYTES = 2**27
"""Size of the float32 logits that are there at once."""
_N_CHECKED = 8

Tail = Callable[[Tensor], Tensor]


class NextTokenLoss:
    """Sum of `-log p(z_t | z_<t)` over scored tokens, in nats, computed in float32 or better.

    The model runs without its unembedding; then each chunk of scored positions goes through the unembedding, the loss
    and back to the hidden states, before the next one does. Adapters and biases on the unembedding, training it, tying
    it to the embedding work as usual, since it is called as a module. What the architecture does to its logits
    afterwards is looked up in its configuration, and compared with what it really does to a few tokens. Where that
    differs, the model's own logits are used, all scored positions at once. So they are where the weights are `sharded`
    over several processes: the unembedding's are then whole only while the model runs.
    """

    def __init__(self, model: nn.Module, sharded: bool = False) -> None:
        inner: Any = model
        self._head: nn.Module = inner.get_output_embeddings()
        self._tail = tail_of(inner.config.get_text_config())
        self._tail_is_known = not sharded and self._check_tail(inner)

    def __call__(
        self,
        model: nn.Module,
        tokens: Int[Tensor, "row pos"],
        labels: Int[Tensor, "row pos"],
        mask: Int[Tensor, "row pos"] | None = None,
    ) -> Float[Tensor, ""]:
        """Rows are padded on the right.

        `mask` is 1 on real tokens and 0 on padding. It is needed only where padding is scored, which then attends to
        real tokens alone: padding is behind all that a real token attends to.
        """
        row, position = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        targets = labels[row, position + 1]
        if not self._tail_is_known:
            with unembed_only(self._head, row, position):
                return _cross_entropy(_run(model, tokens, mask).logits[0], targets)
        hidden = self._hidden(model, tokens, mask)[row, position]
        trained = [weight for weight in self._head.parameters() if weight.requires_grad]
        return _HeadLoss.apply(hidden, targets, self._head, self._tail, *trained)

    def _hidden(self, model: nn.Module, tokens: Tensor, mask: Tensor | None) -> Float[Tensor, "row pos d_model"]:
        """What reaches the unembedding, which itself sees no position."""
        kept: list[Tensor] = []

        def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept.append(args[0])
            return (args[0][:, :0], *args[1:])

        with self._head.register_forward_pre_hook(take):
            _run(model, tokens, mask)
        return kept[0]

    @torch.no_grad()
    def _check_tail(self, model: Any) -> bool:
        """Whether the tail makes the model's logits out of what the unembedding returns."""
        raw: list[Tensor] = []
        tokens = torch.arange(_N_CHECKED, device=self._head.weight.device)[None]  # type: ignore[arg-type]
        with self._head.register_forward_hook(lambda module, args, output: raw.append(output)):
            logits = run_twin(model, tokens, use_cache=False).logits
        tolerance = 8 * torch.finfo(raw[0].dtype).eps
        ours = self._tail(raw[0])
        return logits.shape == ours.shape and torch.allclose(
            ours.float(), logits.float(), rtol=tolerance, atol=0.0, equal_nan=True
        )


def _run(model: nn.Module, tokens: Tensor, mask: Tensor | None) -> Any:
    masked = {} if mask is None else {"attention_mask": mask}
    return run_twin(model, tokens, use_cache=False, **masked)


def tail_of(config: Any) -> Tail:
    """What an architecture does to its logits, by its configuration: a factor (Cohere, Granite), a cap (Gemma 2)."""
    factor = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)

    def tail(logits: Tensor) -> Tensor:
        if factor != 1.0:
            logits = logits * factor
        if divisor != 1.0:
            logits = logits / divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return tail


def _cross_entropy(logits: Float[Tensor, "n d_vocab"], targets: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="sum")


class _HeadLoss(torch.autograd.Function):
    """Summed loss of hidden states; gradients are made in the forward pass, while a chunk's logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, tail: Tail, *trained: Tensor) -> Tensor:
        n_vocab = head.weight.shape[0]  # type: ignore[index]
        size = max(1, _CHUNK_BYTES // (4 * int(n_vocab)))
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        gradient = torch.empty_like(hidden)
        of_trained = [torch.zeros_like(weight) for weight in trained]
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            with torch.enable_grad():
                states = hidden[part].detach().requires_grad_()
                loss = _cross_entropy(tail(head(states)), targets[part])
            gradient[part], *more = torch.autograd.grad(loss, [states, *trained])
            for so_far, added in zip(of_trained, more, strict=True):
                so_far += added
            total += loss.detach()
        ctx.save_for_backward(gradient, *of_trained)
        return total

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> Any:
        gradient, *of_trained = ctx.saved_tensors
        return gradient * scales[0], None, None, None, *[added * scales[0] for added in of_trained]
