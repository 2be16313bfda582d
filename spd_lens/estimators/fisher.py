"""The paper's subspace for the model's own labels in place of the gold ones."""

from __future__ import annotations

from spd_lens.estimators.base import Estimator
from spd_lens.estimators.registry import register


@register
class Fisher(Estimator):
    """The top directions of the Fisher information: of gradients towards tokens drawn from the model itself.

    With gold labels `Σ gᵀg` is the empirical Fisher matrix, which is not the Fisher matrix (Kunstner et al. 2019,
    arXiv 1905.12558). The gold answers have no part in this one, only the places where they stand.
    """

    name = "fisher"
    says = "top directions of the gradients towards answers drawn from the model (the true Fisher matrix)"
    needs = {"labels": "sampled"}
