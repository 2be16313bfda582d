"""What gradients towards the right answers have and gradients towards wrong ones have not."""

from __future__ import annotations

from spd_lens.estimators.base import Estimator, Shape, Source
from spd_lens.estimators.directions import NO_SPECTRUM, leading, unit
from spd_lens.estimators.registry import register
from spd_lens.models import neutral
from spd_lens.subspaces import Subspace


@register
class Contrast(Estimator):
    """The top eigenvectors of `G/tr G - W/tr W`, with `G = Σ gᵀg` for the right answers and `W` for shuffled ones.

    Each is divided by its trace, block by block, because wrong answers surprise the model more: their gradients are
    larger in every direction, and the plain difference would only say so. What is left compares which share of its
    gradient each of the two has in a direction.
    """

    name = "contrast"
    says = "directions with a larger share of the gradient towards right answers than towards shuffled ones"
    lacks = NO_SPECTRUM

    @neutral()
    def estimate(self, source: Source, shape: Shape) -> Subspace:
        right, wrong = (self.moments(source, shuffled=shuffled) for shuffled in (False, True))
        shares = {
            site: [unit(moments.blocks(site, shape.per_head)) for moments in (right, wrong)] for site in right.sites
        }
        return leading(
            right,
            {site: mine - theirs for site, (mine, theirs) in shares.items()},
            {site: mine + theirs for site, (mine, theirs) in shares.items()},
            shape,
        )
