"""Hooks on the lens model's hook points that know whether they are still there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spd_lens.errors import SPDError
from spd_lens.models.torch_private import hook_tables
from spd_lens.sites import Site

HookFunction = Callable[[Float[Tensor, "batch pos head d_head"]], Tensor]


class LensHook:
    """One forward hook at one site of a lens model, of either backend.

    The function is told the site when it is made: what TransformerLens passes as `hook.name` differs between
    backends. `reset_hooks()` removes it, as it removes any hook that is not permanent; `attached` tells.
    """

    def __init__(self, lens: Any, site: Site, function: HookFunction) -> None:
        if site.hook_name not in lens.hook_dict:
            raise SPDError(f"the lens model has no hook point {site.hook_name}")
        self._point = lens.hook_dict[site.hook_name]
        self._point.add_hook(lambda activation, hook: function(activation))
        self._handle = self._point.fwd_hooks[-1]
        # TransformerLens wraps the function: let it be known as one of this library's all the same
        if (hook := hook_tables(self._point, "forward").get(self._handle.hook.id)) is not None:
            hook.__module__ = __name__

    @property
    def attached(self) -> bool:
        return self._handle in self._point.fwd_hooks

    def remove(self) -> None:
        """Take this hook off and leave all others."""
        if self.attached:
            self._point.fwd_hooks.remove(self._handle)
        self._handle.hook.remove()


def named_parts(model: nn.Module) -> dict[str, nn.Module]:
    """A model's modules by name. A TransformerBridge keeps some of the model that it wraps outside of its own tree."""
    inner = getattr(model, "original_model", None)
    wrapped = [] if inner is None else [(f"original_model.{name}", part) for name, part in inner.named_modules()]
    parts: dict[nn.Module, str] = {}
    for name, part in (*model.named_modules(), *wrapped):
        parts.setdefault(part, name)
    return {name: part for part, name in parts.items()}


def unembed_only(head: nn.Module, row: Int[Tensor, " n"], position: Int[Tensor, " n"]) -> RemovableHandle:
    """Let a model's unembedding see only some positions, so that its logits are `[1, n, d_vocab]`: `with` ends that.

    A vocabulary of 150,000 is a quarter of a 0.5B model's work, and a float32 row of it is 600 kB. Whatever the model
    does to its logits afterwards (soft caps, scaling) is per position and still happens.
    """

    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        where = args[0].device  # of the layer before the head, which may be another than the embedding's
        return (args[0][row.to(where), position.to(where)][None], *args[1:])

    return head.register_forward_pre_hook(select)


@contextlib.contextmanager
def run_only(
    modules: Iterable[nn.Module], row: Int[Tensor, " n"], position: Int[Tensor, " n"], n_positions: int
) -> Iterator[None]:
    """Let modules that work on each position by itself see only some; at all others their output is zero.

    Exact where nothing that matters depends on the other positions' outputs, as in the last block, of which only the
    keys and values of a position reach another.
    """

    shapes: dict[nn.Module, torch.Size] = {}
    # transformers flattens batch and position in front of some layers
    flat = row * n_positions + position

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shapes[module] = args[0].shape[:-1]
        picked = args[0].flatten(0, -2)[flat.to(args[0].device)]
        return (picked.view(*[1] * (args[0].ndim - 2), *picked.shape), *args[1:])

    def scatter(module: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # some mixtures of experts return the router's output as well
            return (scatter(module, _, output[0]), *output[1:])
        whole = output.new_zeros(shapes[module].numel(), output.shape[-1])
        return whole.index_copy(0, flat.to(output.device), output.flatten(0, -2)).view(*shapes[module], -1)

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(select).remove)
            stack.callback(module.register_forward_hook(scatter).remove)
        yield
