"""Hooks on the lens model's hook points that know whether they are still there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from spd_lens.errors import SPDError
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

    @property
    def attached(self) -> bool:
        return self._handle in self._point.fwd_hooks

    def remove(self) -> None:
        """Take this hook off and leave all others."""
        if self.attached:
            self._point.fwd_hooks.remove(self._handle)
        self._handle.hook.remove()
