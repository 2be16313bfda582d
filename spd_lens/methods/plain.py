"""The model as it is, and plain self-retraining: what any method must beat."""

from __future__ import annotations

from spd_lens.methods.base import Method
from spd_lens.methods.registry import register


@register
class Base(Method):
    """No training at all."""

    name = "base"
    says = "the model as it is"


@register
class PlainSelfRetraining(Method):
    """Fine-tune on raw completions of the model's own."""

    name = "psr"
    says = "plain self-retraining: own raw outputs (paper section 4.1)"
