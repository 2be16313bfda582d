"""The model as it is, and plain self-retraining: what any method must beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spd_lens.methods.base import Method
from spd_lens.methods.registry import register
from spd_lens.runs import Experiment


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


@register
class PlainSelfRetrainingReference(PlainSelfRetraining):
    """As the reference code's script for it has it: no nucleus, and all epochs.

    That script trains in bfloat16 where the others train in float16; here all methods of a study share its dtype.
    """

    name = "psr-reference"
    says = "plain self-retraining: temperature 0.7, top-p 1.0, no early stop (reference code)"

    def sampling(self, experiment: Experiment) -> Mapping[str, float | int | None]:
        return {"temperature": 0.7, "top_p": 1.0, "top_k": experiment.config.top_k}

    def training(self, experiment: Experiment) -> Mapping[str, Any]:
        return {"early_stop": False}
