"""Methods x source tasks x target tasks x seeds on one model, with everything shared that can be shared."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spd_lens.study.config import StudyConfig, preset_names
    from spd_lens.study.engine import run_study
    from spd_lens.study.folder import Cell, Study
    from spd_lens.study.plan import make_plan
    from spd_lens.study.results import corpora_frame, results_frame

# Loaded when first used: settings and plans need neither torch nor a model.
_HOME = {
    "Cell": "folder",
    "Study": "folder",
    "StudyConfig": "config",
    "corpora_frame": "results",
    "make_plan": "plan",
    "preset_names": "config",
    "results_frame": "results",
    "run_study": "engine",
}

__all__ = [
    "Cell",
    "Study",
    "StudyConfig",
    "corpora_frame",
    "make_plan",
    "preset_names",
    "results_frame",
    "run_study",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spd_lens.study' has no attribute {name!r}")
    return getattr(importlib.import_module(f"spd_lens.study.{_HOME[name]}"), name)
