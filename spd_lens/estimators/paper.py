"""The paper's own subspace."""

from __future__ import annotations

from spd_lens.estimators.base import Estimator, Shape, Source
from spd_lens.estimators.registry import register
from spd_lens.subspaces import Subspace


@register
class Paper(Estimator):
    """The top right singular vectors of the stacked gradients of every token (Eq. 6-11)."""

    name = "paper"
    says = "top directions of the gradients at every token (Eq. 6-11)"

    def subspace(self, source: Source, shape: Shape) -> Subspace:
        """Not marked with a name, so that files are those of earlier versions."""
        return self.estimate(source, shape)
