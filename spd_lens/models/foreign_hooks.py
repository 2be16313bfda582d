"""Hooks that somebody else left on a model: they may look, and are refused where they change what is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spd_lens.errors import SPDError
from spd_lens.models.hooks import named_parts
from spd_lens.models.torch_private import hook_tables, times_written

_KINDS = {
    "forward_pre": lambda passed: passed if len(passed) > 1 else passed[0],
    "forward": lambda passed: passed[-1],
    "backward_pre": lambda passed: passed[0],
    "backward": lambda passed: passed[0],
}
"""Kinds of hooks, and which of their arguments they may replace."""


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[None]:
    """While open, a hook that is not this library's raises `SPDError` when it changes what passes it.

    A hook that only looks, to count passes or to keep activations, works as usual.
    """
    put = []
    for name, module in {"every module": None, **named_parts(model)}.items():
        for kind, replaceable in _KINDS.items():
            table = hook_tables(module, kind)
            for key, hook in table.items():
                if _is_foreign(hook, module):
                    put.append((table, key, hook))
                    table[key] = partial(_looking_only, hook, name, replaceable)
    try:
        yield
    finally:
        for table, key, hook in put:
            if key in table:  # it may have taken itself off
                table[key] = hook


def _is_foreign(hook: Callable[..., Any], module: nn.Module | None) -> bool:
    """Whether a hook is a user's. TransformerLens has hooks of its own on some modules, and a user's on hook points."""
    hook = getattr(hook, "func", hook)  # what a partial calls
    package = (getattr(hook, "__module__", None) or "").partition(".")[0]
    return package != "spd_lens" and (package != "transformer_lens" or hasattr(module, "add_hook"))


def _looking_only(
    hook: Callable[..., Any], name: str, replaceable: Callable[..., Any], module: nn.Module, *passed: Any
) -> Any:
    tensors = [value for value in _flat(passed) if isinstance(value, Tensor)]
    before = list(map(times_written, tensors))
    result = hook(module, *passed)
    if before != list(map(times_written, tensors)) or (result is not None and not _same(result, replaceable(passed))):
        raise SPDError(
            f"a hook on {name or 'the model'} changes what passes there, so the numbers would not be those of the "
            "model; take it off (handle.remove(), lens.reset_hooks(including_permanent=True)), or only look in it"
        )
    return result


def _same(result: Any, given: Any) -> bool:
    new, old = _flat(result), _flat(given)
    return len(new) == len(old) and all(a is b or _equal(a, b) for a, b in zip(new, old, strict=True))


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)


def _flat(values: Any) -> list[Any]:
    if isinstance(values, dict):
        values = tuple(values.values())
    if not isinstance(values, (tuple, list)):
        return [values]
    return [leaf for value in values for leaf in _flat(value)]
