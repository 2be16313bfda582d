"""`Policy`: the model as it is, under a projection, with an adapter, or both."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from spd_lens.models import ModelPair
from spd_lens.models.adapters import adapted
from spd_lens.projection import folded
from spd_lens.subspace import Subspace


@dataclass(frozen=True)
class Policy:
    """One way to run a pair's twin. `Policy("base")` is the model itself."""

    name: str
    subspace: Subspace | None = None
    strength: float = 1.0
    adapter: str | Path | None = None

    @property
    def is_base(self) -> bool:
        """Whether it changes nothing."""
        return self.adapter is None and (self.subspace is None or self.strength == 0.0)

    @contextlib.contextmanager
    def applied(self, pair: ModelPair) -> Iterator[nn.Module]:
        """The twin under this policy; as it was afterwards."""
        with adapted(pair.hf, self.adapter) as model, folded(model, self.subspace, self.strength):
            yield model
