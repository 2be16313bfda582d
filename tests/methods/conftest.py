"""An experiment on the tiny models: what methods are given in a study."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spd_lens import tasks
from spd_lens.models.pair import ModelPair
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.experiment import Experiment

SETTINGS: dict[str, Any] = {
    "task": "synthetic-math",
    "n_calibration": 12,
    "n_train": 12,
    "max_new_tokens": 24,
    "rank": 0.5,
    "engine": "twin",
}


@pytest.fixture(scope="session")
def experiment_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Experiment]:
    """`experiment_of(pair, kinds=["k"])`: one folder for each pair and settings, so that extractions are shared."""
    folders: dict[tuple[str, ...], Path] = {}

    def make(pair: ModelPair, **settings: Any) -> Experiment:
        config = SPDConfig.make({**SETTINGS, "model": pair.name, **settings})
        key = (pair.name, *(f"{name}={value}" for name, value in settings.items() if name in ("kinds", "layers")))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("experiment")
        return Experiment(config, folders[key], pair=pair, tasks=(tasks.get(config.task), {}), shared=True)

    return make


@pytest.fixture
def experiment(tiny_pair, experiment_of) -> Experiment:
    """On the Llama."""
    return experiment_of(tiny_pair)
