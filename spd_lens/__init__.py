"""Self-Policy Distillation (arXiv 2605.22675) for TransformerLens.

Find the low-rank K/V subspace that a model's correctness gradients live in, look at it, apply it as hooks or as
weights, distil it, and measure what it did.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spd_lens import tasks
    from spd_lens.capture import extract
    from spd_lens.config import SPDConfig
    from spd_lens.corpus import Corpus
    from spd_lens.errors import SPDError
    from spd_lens.evaluation import EvalResult, evaluate
    from spd_lens.examples import Example
    from spd_lens.generation import generate
    from spd_lens.models import ModelPair, load
    from spd_lens.moments import GradientMoments
    from spd_lens.pipeline import run
    from spd_lens.projection import fold_to, folded, projected
    from spd_lens.rundir import Run
    from spd_lens.sites import Site
    from spd_lens.subspace import Subspace
    from spd_lens.training import finetune

# Loaded when first used: torch, transformers and peft take seconds to import, `spd-lens --help` should not.
_HOME = {
    "Corpus": "corpus",
    "EvalResult": "evaluation",
    "Example": "examples",
    "GradientMoments": "moments",
    "ModelPair": "models",
    "Run": "rundir",
    "SPDConfig": "config",
    "SPDError": "errors",
    "Site": "sites",
    "Subspace": "subspace",
    "evaluate": "evaluation",
    "extract": "capture",
    "finetune": "training",
    "fold_to": "projection",
    "folded": "projection",
    "generate": "generation",
    "load": "models",
    "projected": "projection",
    "run": "pipeline",
}

__all__ = [
    "Corpus",
    "EvalResult",
    "Example",
    "GradientMoments",
    "ModelPair",
    "Run",
    "SPDConfig",
    "SPDError",
    "Site",
    "Subspace",
    "evaluate",
    "extract",
    "finetune",
    "fold_to",
    "folded",
    "generate",
    "load",
    "projected",
    "run",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name == "tasks":
        return importlib.import_module("spd_lens.tasks")
    if name not in _HOME:
        raise AttributeError(f"module 'spd_lens' has no attribute {name!r}")
    return getattr(importlib.import_module(f"spd_lens.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
