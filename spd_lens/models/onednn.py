"""Matrix products of weights in float32 on x86 processors, by oneDNN.

PyTorch gives float32 products to MKL, which on processors that Intel did not make is half as fast as they are. oneDNN,
which PyTorch has too and uses for bfloat16, is not. Both sum in float32 and err alike against float64.
`torch.backends.mkldnn.flags(enabled=False)` turns oneDNN off.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spd_lens.models.devices import free_memory, onednn_takes
from spd_lens.models.torch_private import has_onednn_product, is_lazy, onednn_packed, onednn_product


def available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this machine's PyTorch has the product, which is what `torch.compile` calls, and it is worth calling."""
    return platform.machine().lower() in ("x86_64", "amd64") and onednn_takes(dtype) and has_onednn_product()


def fast_products(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """While open, oneDNN computes products with frozen float32 weights on the CPU, in forward and backward passes.

    For passes over many tokens: each call of a torch function costs a microsecond or two more. The backward pass
    computes checkpointed activations again outside of it: see `recomputed_alike`.
    """
    fitting = device.type == "cpu" and dtype == torch.float32 and available()
    return _FastProducts() if fitting else contextlib.nullcontext()


def recomputed_alike(
    device: torch.device, dtype: torch.dtype
) -> Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]:
    """`context_fn` for gradient checkpointing under `fast_products`: what is computed again is computed as it was."""
    return lambda: (contextlib.nullcontext(), fast_products(device, dtype))


class _FastProducts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not kwargs:
            if func is F.linear and _fits(*args):
                return _linear(*args)
            if func is torch.addmm and _fits(args[1], args[2], args[0]) and args[0].ndim == 1:
                bias, rows, weight = args
                return _linear(rows, weight.t(), bias)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Linear layers multiply with copies of their weights in the order in which oneDNN reads them.

    This is for passes over a few tokens, where it saves half of the time in float32 and a third in bfloat16. The
    weights must stay as they are meanwhile, and nothing has a gradient. Where memory is short, or oneDNN does not take
    the dtype on this processor, nothing changes.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and m.weight.device.type == "cpu"]
    # somebody may have put a forward of their own on a layer
    layers = [m for m in layers if available(m.weight.dtype) and "forward" not in vars(m)]
    size = sum(m.weight.numel() * m.weight.itemsize for m in layers)
    if size > free_memory(torch.device("cpu")) / 2:
        yield
        return
    with contextlib.ExitStack() as stack:
        for layer in layers:
            weight = onednn_packed(_readable(layer.weight.detach()))
            layer.forward = partial(onednn_product, weight=weight, bias=layer.bias)  # type: ignore[method-assign]
            stack.callback(vars(layer).pop, "forward")
        yield


def _fits(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        weight.dtype == rows.dtype == torch.float32
        and weight.device.type == rows.device.type == "cpu"
        and weight.ndim == 2
        and rows.numel() > 0
        and not weight.requires_grad
        and not (bias is not None and bias.requires_grad)
    )


def _linear(
    rows: Float[Tensor, "*row inner"], weight: Float[Tensor, "outer inner"], bias: Float[Tensor, " outer"] | None = None
) -> Float[Tensor, "*row outer"]:
    if torch.is_grad_enabled() and rows.requires_grad:
        return _Linear.apply(rows, weight, bias)
    return onednn_product(rows, _readable(weight), bias)


class _Linear(torch.autograd.Function):
    """A product with a gradient for the rows alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return onednn_product(rows, _readable(weight), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # oneDNN reads the transpose by its strides, as fast as a copy in order
        return onednn_product(gradients[0], _readable(ctx.weight).t(), None), None, None


def _readable(weight: Tensor) -> Tensor:
    """oneDNN asks for the weight as if to write it, which would end the sharing of copy-on-write storage."""
    weight = weight.contiguous()
    return weight.clone() if is_lazy(weight) else weight
