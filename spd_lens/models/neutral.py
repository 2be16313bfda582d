"""PyTorch's own defaults around all that is computed, however the process and the models were left.

A notebook leaves a model in training mode, autocast open, gradients off, another default dtype or device; a script
compiles a model or enables gradient checkpointing. None of that may change a number, and none of it is changed: what
was found is there again afterwards. Every function that runs a model does so inside `neutral`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spd_lens.errors import SPDError
from spd_lens.models.foreign_hooks import watched
from spd_lens.models.hooks import named_parts
from spd_lens.models.torch_private import (
    attention_order,
    is_compiled,
    is_wrapped_by_compile,
    open_modes,
    without_wrappers,
)

P = ParamSpec("P")
R = TypeVar("R")

_FLAGS = (
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", True),
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", True),
    (torch.backends.cuda.matmul, "allow_fp16_accumulation", False),
)
"""Settings of products on CUDA, with PyTorch's defaults."""
_ATTENTIONS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.OVERRIDEABLE,
]
"""All kernels of scaled dot product attention, in PyTorch's order."""
_local = threading.local()


@contextlib.contextmanager
def neutral(*models: nn.Module) -> Iterator[None]:
    """While open, PyTorch computes as in a fresh process, and the models as for inference; then all is as it was.

    Gradients can be taken, autocast is closed, inference mode left, new tensors are float32 on the CPU, products are
    exact to their dtype, and nothing drawn inside is missing from the global random generators afterwards. The models
    are in evaluation mode, frozen, neither compiled nor checkpointed. Contexts nest. Not to be left open across a
    `yield` to a caller, who would be in it too.

    Raises:
        SPDError: a mode of PyTorch's is open under which numbers may be others; a model has hooks that change what it
            computes, layers behind `torch.compile`, or weights made in inference mode.
    """
    inside: frozenset[int] = getattr(_local, "inside", frozenset())
    new = [model for model in models if id(model) not in inside]
    with contextlib.ExitStack() as stack:
        if not inside:
            for mode in open_modes():
                raise SPDError(
                    f"a {type(mode).__name__} is open, through which every operation of PyTorch would pass; close it "
                    "around calls of spd_lens (to measure them, torch.profiler works)"
                )
            for context in (random_kept, _modes, _products):
                stack.enter_context(context())
        for model in new:
            stack.enter_context(_as_for_inference(model))
            stack.enter_context(watched(model))
        _local.inside = inside | {id(_local), *map(id, new)}
        try:
            yield
        finally:
            _local.inside = inside


def neutrally(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function whose first argument is a `ModelPair` (or a method of it) run inside `neutral`.

    A generator runs inside from each `yield` to the next, so that its caller is never inside.
    """

    def pair_of(*args: Any, **kwargs: Any) -> Any:
        pair = args[0] if args else kwargs.get("pair")
        if not hasattr(pair, "models"):
            raise SPDError(f"{function.__name__} takes a ModelPair, as spd_lens.load makes one, not {pair!r}")
        return pair

    @functools.wraps(function)
    def whole(*args: P.args, **kwargs: P.kwargs) -> R:
        with neutral(*pair_of(*args, **kwargs).models):
            return function(*args, **kwargs)

    @functools.wraps(function)
    def stepwise(*args: P.args, **kwargs: P.kwargs) -> Any:
        pair, steps = pair_of(*args, **kwargs), function(*args, **kwargs)
        assert isinstance(steps, Generator)
        with contextlib.closing(steps):
            while True:
                with neutral(*pair.models):
                    try:
                        found = next(steps)
                    except StopIteration:
                        return
                yield found

    return stepwise if inspect.isgeneratorfunction(function) else whole


def _is_wrapped(module: nn.Module) -> bool:
    """Whether the module's `forward` is its class's own in a wrapper, as `torch.compile(module.forward)` is one, and
    what accelerate leaves behind a training in mixed precision."""
    forward = vars(module).get("forward")
    if hasattr(module, "_hf_hook"):  # accelerate's wrapper moves inputs and loads weights
        return False
    return forward is not None and without_wrappers(forward) is without_wrappers(type(module).forward)


def refuse_compiled(model: nn.Module) -> None:
    """Raise `SPDError` if hooks on the model may have no effect."""
    if id(model) in getattr(_local, "inside", frozenset()):  # where no model is compiled
        return
    found = next((name or "the model itself" for name, part in named_parts(model).items() if is_compiled(part)), None)
    if found is not None:
        raise SPDError(
            f"{found} is compiled (torch.compile), and a compiled model may not notice hooks, so the projection would "
            "have no effect; use the model as it was before, or work inside `with torch.compiler.set_stance"
            "('force_eager')` on a model that was compiled in place"
        )


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Products in the dtype of what is multiplied."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else contextlib.nullcontext()


@contextlib.contextmanager
def random_kept() -> Iterator[None]:
    """Put the global random generators back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def _modes() -> Iterator[None]:
    """While open: gradients possible, no autocast, new tensors float32 on the CPU, determinism at most warns."""
    dtype, stance = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda", "mps", "xpu"):
            stack.enter_context(without_autocast(kind))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if stance and not warn_only:
            stack.callback(torch.use_deterministic_algorithms, True)
            torch.use_deterministic_algorithms(True, warn_only=True)
        yield


@contextlib.contextmanager
def _products() -> Iterator[None]:
    """While open, products are exact to their dtype (no TF32, no bfloat16 in their place), and attention has all of its
    kernels, in PyTorch's order."""
    backends: Any = torch.backends
    own = [(backend, backend.fp32_precision) for backend in (backends.mkldnn.matmul, backends.cuda.matmul)]
    with attention_order(_ATTENTIONS), sdpa_kernel(_ATTENTIONS), contextlib.ExitStack() as stack:
        for where, name, default in _FLAGS:
            stack.callback(setattr, where, name, getattr(where, name))
            setattr(where, name, default)
        if {value for _, value in own} - {"none", "ieee"} or backends.fp32_precision not in ("none", "ieee"):
            for backend, value in own:  # called after the older setting's, which sets these too
                stack.callback(setattr, backend, "fp32_precision", value)
            with contextlib.suppress(RuntimeError):  # it refuses to say where the newer settings were used
                stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


@contextlib.contextmanager
def _as_for_inference(model: nn.Module) -> Iterator[None]:
    """While open: evaluation mode, frozen weights, no gradient checkpointing, nothing compiled, ordinary buffers."""
    _refuse_wrapped(model)
    modules = list(named_parts(model).values())
    ordinary_buffers(modules)
    with contextlib.ExitStack() as stack:
        if any(map(is_compiled, modules)):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in modules:
            own = vars(module)
            for flag in ("training", "gradient_checkpointing"):  # by attribute: train() of a subclass may do more
                if own.get(flag):
                    stack.callback(setattr, module, flag, True)
                    setattr(module, flag, False)
            if _is_wrapped(module):  # taken off, and not only called eagerly: a copy of the model would call this one's
                stack.callback(own.__setitem__, "forward", own.pop("forward"))
        for weight in model.parameters():
            if weight.requires_grad:
                stack.callback(weight.requires_grad_, True)
                weight.requires_grad_(False)
        yield


def ordinary_buffers(modules: Iterable[nn.Module]) -> None:
    """Copy buffers that were set in inference mode, as rotary frequencies that depend on the length are: autograd takes
    no inference tensor."""
    for module in modules:
        made = {name: x for name, x in module.named_buffers(recurse=False) if x.is_inference()}
        for name, buffer in made.items():
            setattr(module, name, buffer.clone())


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in named_parts(model).items():
        if is_wrapped_by_compile(module):
            raise SPDError(
                f"{name} of {type(model).__name__} was put behind torch.compile, which changes the names of its "
                "weights; compile it in place (layer.compile()), or leave it as it was"
            )
    for name, weight in model.named_parameters():
        if weight.is_inference():
            raise SPDError(
                f"{name} of {type(model).__name__} was made inside torch.inference_mode(), so that no gradient can "
                "pass it; make or load the model outside of it"
            )
