"""`Policy`: the model as it is, under a projection, with an adapter, or both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from spd_lens.errors import SPDError
from spd_lens.models import ModelPair, adapted, first_adapted_layer
from spd_lens.subspaces.projection import folded
from spd_lens.subspaces.subspace import Subspace, check_strength


@dataclass(frozen=True)
class Policy:
    """One way to run a pair's twin. `Policy()` is the model itself."""

    name: str = ""
    """By default `base`, `projected`, `tuned` or `tuned+projected`."""
    subspace: Subspace | None = None
    """What is kept of the keys and values, at prompt and new tokens alike (Eq. 12)."""
    strength: float = 1.0
    """Strength of the projection, from 0 (none) to 1."""
    adapter: str | Path | None = None
    """Directory of a LoRA adapter or of a checkpoint of `finetune`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", check_strength(self.strength))
        if not self.name:
            parts = [name for name, of in (("tuned", self.adapter), ("projected", self.subspace)) if of is not None]
            object.__setattr__(self, "name", "+".join(parts) or "base")

    @classmethod
    def given(cls, policy: Policy | None, subspace: Any, strength: float, adapter: str | Path | None) -> Policy:
        """The policy that a function was given whole, or by its parts. For `generate` a subspace may be a choice.

        Raises:
            SPDError: Both were given, or something that is no policy.
        """
        if policy is None:
            return cls("", subspace, strength, adapter)
        if not isinstance(policy, Policy):
            raise SPDError(f"policy is {policy!r}; it must be a Policy of spd_lens.evaluation")
        if subspace is not None or adapter is not None or strength != 1.0:
            raise SPDError(f"policy {policy.name!r} was given beside subspace, strength or adapter; leave those out")
        return policy

    @property
    def is_base(self) -> bool:
        """Whether it changes nothing."""
        return self.adapter is None and (self.subspace is None or self.strength == 0.0)

    def first_layer(self, pair: ModelPair) -> int:
        """Below this layer the twin computes under the policy what it computes without; 0 where that is not known."""
        layers = [] if self.subspace is None else [min(site.layer for site in self.subspace.sites)]
        if self.adapter is not None:
            layers.append(first_adapted_layer(pair.hf, self.adapter))
        return min(layers, default=0)

    @contextlib.contextmanager
    def applied(self, pair: ModelPair) -> Iterator[nn.Module]:
        """The twin under this policy; as it was afterwards."""
        # the adapter first, so that what it adds is projected too
        with adapted(pair.hf, self.adapter) as model, folded(model, self.subspace, self.strength):
            yield model
