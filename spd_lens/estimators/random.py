"""The control that any estimator needs beside it."""

from __future__ import annotations

from spd_lens.estimators.base import Estimator, Shape, Source
from spd_lens.estimators.paper import Paper
from spd_lens.estimators.registry import register
from spd_lens.subspaces import Subspace


@register
class Random(Estimator):
    """Uniformly random directions with the ranks of the paper's subspace; the source's seed names the draw."""

    name = "random"
    says = "control: random directions with the ranks of the paper's"
    is_control = True

    def estimate(self, source: Source, shape: Shape) -> Subspace:
        return Paper().subspace(source, shape).random_like(source.seed)
