"""PyTorch's private interfaces: all that the library uses, each behind a function that says what it is for.

None of them is needed. Where a release of PyTorch lacks one, or all of them are switched off (`SPD_LENS_PLAIN_TORCH=1`
in the environment when the library is imported, or `torch_private.enabled = False` later), the plain path runs:

| function | purpose | without it |
| --- | --- | --- |
| `lazy_copy`, `is_lazy`, `own_memory` | models share the memory of equal weights | each has its own |
| `has_onednn_product`, `onednn_product`, `onednn_packed` | fast float32 products on x86 | PyTorch's own |
| `onednn_takes_bfloat16` | whether dtype "auto" on a CPU is bfloat16 | it is float32 |
| `open_modes` | modes that may change numbers are refused | they go unnoticed |
| `attention_order` | kernels of attention are tried in PyTorch's order | in the order that was found |
| `hook_tables` | hooks of others that change numbers are refused | they go unnoticed |
| `times_written` | weights that were edited in place are noticed | only replaced weights, and those in digests |

What `torch.compile` leaves on modules is known by the names of attributes (`before_compile` and below). Looking for
them cannot fail, and a projection has no effect on some compiled models, so that this is never switched off. Nor is
`sync_trained_alone`, which sets an attribute, too: where a release does not read it, `untouched` says so.

`tests/models/test_torch_private.py` says with which release each was seen to work.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

enabled = os.environ.get("SPD_LENS_PLAIN_TORCH", "0") in ("", "0")
"""Whether private interfaces are used."""

# Where torch's operations tell reading from writing. On MPS some write through a pointer that they took for reading
# (pytorch#150569), which copy-on-write storage does not notice.
_SHARING = ("cpu", "cuda")


def lazy_copy(weight: Tensor) -> Tensor:
    """A copy that takes memory only when it or the original is written to; of a view as of a whole tensor.

    Torch's copy-on-write storage: who writes gets a storage of its own, so that neither ever sees the other's edits. On
    CUDA, edit weights on the stream that they were loaded on (the default one), with which torch orders that copy.
    """
    if enabled and weight.device.type in _SHARING:
        # RuntimeError: the storage is one that torch does not manage
        with contextlib.suppress(AttributeError, RuntimeError):
            return torch._lazy_clone(weight.detach())
    return weight.detach().clone()


def is_lazy(weight: Tensor) -> bool:
    """Whether a weight's storage is, or was, shared with a `lazy_copy`; true where torch cannot say."""
    found = getattr(torch._C, "_is_cow_tensor", None) if enabled else None
    return True if found is None else bool(found(weight))


def own_memory(model: nn.Module) -> None:
    """Read weights that lie in a mapped file, as safetensors leaves them, into memory that `lazy_copy` can share."""
    if not enabled or not hasattr(torch, "_lazy_clone"):
        return
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            try:
                torch._lazy_clone(parameter.detach())
            except RuntimeError:
                parameter.data = parameter.detach().clone()


def has_onednn_product() -> bool:
    """Whether oneDNN is switched on, and PyTorch has its product with a weight, which is what `torch.compile` calls."""
    switched_on = getattr(torch._C, "_get_mkldnn_enabled", lambda: True)
    return enabled and bool(switched_on()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_product(
    rows: Float[Tensor, "*row inner"], weight: Float[Tensor, "outer inner"], bias: Float[Tensor, " outer"] | None
) -> Float[Tensor, "*row outer"]:
    """`rows @ weight.T + bias`, without a gradient; the weight dense, or from `onednn_packed`."""
    return torch.ops.mkldnn._linear_pointwise(rows.contiguous(), weight, bias, "none", [], "")


def onednn_packed(weight: Tensor) -> Tensor:
    """A copy of a weight in the order in which oneDNN reads it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def onednn_takes_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this processor, in this environment."""
    found = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None) if enabled else None
    return found is not None and bool(found())


def open_modes() -> list[Any]:
    """Modes that every operation of PyTorch passes through now, other than the default device."""
    if not enabled:
        return []
    try:
        from torch.overrides import _get_current_function_mode_stack
        from torch.utils._device import DeviceContext
        from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
    except ImportError:
        return []
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    return [mode for mode in modes if not isinstance(mode, DeviceContext)]


@contextlib.contextmanager
def attention_order(kernels: Sequence[Any]) -> Iterator[None]:
    """While open, scaled dot product attention tries its kernels in this order."""
    if not enabled or not hasattr(torch._C, "_set_sdp_priority_order"):
        yield
        return
    own, wanted = torch._C._get_sdp_priority_order(), [int(kernel) for kernel in kernels]
    with contextlib.ExitStack() as stack:
        if own != wanted:
            stack.callback(torch._C._set_sdp_priority_order, own)
            torch._C._set_sdp_priority_order(wanted)
        yield


def hook_tables(module: nn.Module | None, kind: str) -> dict[int, Callable[..., Any]]:
    """A module's hooks of a kind (`forward_pre`, `forward`, `backward_pre`, `backward`), which may be exchanged there;
    None for those of every module."""
    if not enabled:
        return {}
    if module is None:
        return getattr(torch.nn.modules.module, f"_global_{kind}_hooks", {})
    return getattr(module, f"_{kind}_hooks", {})


def times_written(tensor: Tensor) -> int | None:
    """How often a tensor was written to in place; None for an inference tensor, which does not count that."""
    return None if not enabled or tensor.is_inference() else getattr(tensor, "_version", None)


def sync_trained_alone(model: nn.Module) -> None:
    """Let `DistributedDataParallel` leave frozen weights and buffers as they are, instead of writing those of the first
    process over them."""
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    model._ddp_params_and_buffers_to_ignore = [*frozen, *(name for name, _ in model.named_buffers())]  # type: ignore[assignment]


def before_compile(model: Any) -> Any:
    """The model that `torch.compile` has put itself around; any other model as it is."""
    return getattr(model, "_orig_mod", model)


def is_wrapped_by_compile(module: nn.Module) -> bool:
    """Whether this is what `torch.compile` has put around a module."""
    return "_orig_mod" in module._modules


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` or `module.compile()` runs this very module: a hook inside may have no effect then."""
    return (
        is_wrapped_by_compile(module)
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    )


def without_wrappers(function: Any) -> Any:
    """The function inside bound methods and decorators, `torch.compile` among them."""
    for name in ("__func__", "__wrapped__", "_torchdynamo_orig_callable"):
        if hasattr(function, name):
            return without_wrappers(getattr(function, name))
    return function
