"""The paper's subspace without the positions where models park attention."""

from __future__ import annotations

from spd_lens.estimators.region import Region
from spd_lens.estimators.registry import register


@register
class NoSink(Region):
    """Every position but the sink, which holds most of the gradient energy in many models (`analyze tokens`)."""

    name = "no-sink"
    says = "top directions of the gradients at every token but the attention sink"
    classes = ("prompt", "completion", "scored")
