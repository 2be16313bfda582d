"""An accelerator that is not there: tensors on the device `fake`, whose numbers a CPU computes.

A tensor that somebody forgot to move is found on an accelerator only, and the machines that run these tests may have
none. This one is a backend of PyTorch's own kind (`PrivateUse1`): `torch.empty(3, device="fake")` and `x.to("fake")`
work, `x.device` says so, autograd and whole models run on it, and all numbers are those of the CPU. As on CUDA, an
operation that is given tensors of both devices raises, unless the one on the CPU has no axes, is copied, or indexes the
other; so does `numpy()` of a tensor there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "fake"

_aten = torch.ops.aten
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_JOINING = {_aten.cat.default, _aten.stack.default}
_libraries = [torch.library.Library(namespace, "IMPL") for namespace in ("_", "aten")]
_available = False


class OnFake(Tensor):
    """A tensor there; `held` is the one on the CPU that has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnFake:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device(NAME, 0),
        )  # fmt: skip

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(operation, *args, **(kwargs or {}))

    def __repr__(self) -> str:
        return f"{self.held!r} on {NAME}"

    # What PyTorch does not ask the class about, because a tensor of this kind has no storage.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None  # modules are then moved by swapping, which keeps tied weights tied

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> OnFake:
        return OnFake(parts["held"])

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]  # its shape and dtype
        self.held = new.held


def _computed(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """What an operation makes: on the device that it names, else where its tensors are."""
    leaves = tree_leaves((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    there = any(isinstance(x, OnFake) for x in tensors)
    if named := [x for x in leaves if isinstance(x, torch.device)]:
        there = named[0].type == NAME
    elif operation is _aten.to.other:
        there = isinstance(args[1], OnFake)
    elif there and operation is not _aten.copy_.default:
        _check_together(operation, args, tensors)
    args, kwargs = tree_map(_on_cpu, (args, kwargs))
    given = {id(_on_cpu(x)): x for x in tensors}  # operations in place return what they got

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        own = given.get(id(x))
        if own is not None and (isinstance(own, OnFake) == there or operation is _aten.copy_.default):
            if own.shape != x.shape:  # `out`, which has taken the shape of what was written to it
                own.data = OnFake(x)
            return own
        x = x if own is None else x.clone()  # moved, which left it where it was
        return OnFake(x) if there else x

    # a view of an ordinary tensor is ordinary in inference mode, too
    ordinary = operation.is_view and not any(x.is_inference() for x in tensors)
    with torch.inference_mode(False) if ordinary else contextlib.nullcontext():
        return tree_map(placed, operation(*args, **kwargs))


def _on_cpu(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cpu")
    return x.held if isinstance(x, OnFake) else x


def _check_together(operation: Any, args: Any, tensors: list[Tensor]) -> None:
    written = [x for x, described in zip(args, operation._schema.arguments, strict=False) if described.is_write]
    if operation in _INDEXING:
        tensors = [x for n, x in enumerate(args) if n != 1 and isinstance(x, Tensor)]
    stray = [
        x for x in tensors
        if not isinstance(x, OnFake) and (x.dim() or operation in _JOINING or any(x is own for own in written))
    ]  # fmt: skip
    if stray:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {operation} got one of shape {list(stray[0].shape)} "
            f"on the CPU and another on {NAME}:0"
        )


class _Hooks(torch._C._acc.PrivateUse1Hooks):  # type: ignore[misc, name-defined]
    """Only inside `fake_device` is it what PyTorch calls the accelerator of this machine."""

    def is_available(self) -> bool:
        return _available

    is_built = is_available

    def has_primary_context(self, dev_id: int) -> bool:
        return _available


class _Module(_DummyBackendModule):
    """`torch.fake`."""

    def is_available(self) -> bool:
        return _available

    def device_count(self) -> int:
        return int(_available)


def register() -> None:
    """Make the device known to PyTorch: before the first backward pass, which starts a thread for each device."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module(), hook=_Hooks())
    _libraries[0].fallback(lambda operation, *args, **kwargs: _computed(operation, *args, **kwargs), "PrivateUse1")
    # with which `torch.tensor` and an index that is a list go past the tensor's class
    _libraries[1].impl("copy_", partial(_computed, _aten.copy_.default), "PrivateUse1")


@contextlib.contextmanager
def fake_device() -> Iterator[str]:
    """While open, the device can be used; yields its name."""
    global _available
    _available = True
    try:
        yield NAME
    finally:
        _available = False
