"""A workshop on the tiny models: what methods are given in a study."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spd_lens import tasks
from spd_lens.config import SPDConfig
from spd_lens.methods import Workshop
from spd_lens.models import ModelPair

SETTINGS: dict[str, Any] = {
    "task": "synthetic-math",
    "n_calibration": 12,
    "n_train": 12,
    "max_new_tokens": 24,
    "rank": 0.5,
    "engine": "twin",
}


@pytest.fixture(scope="session")
def workshop_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Workshop]:
    """`workshop_of(pair, kinds=["k"])`: one folder for each pair and settings, so that extractions are shared."""
    folders: dict[tuple[str, ...], Path] = {}

    def make(pair: ModelPair, **settings: Any) -> Workshop:
        config = SPDConfig.make({**SETTINGS, "model": pair.name, **settings})
        key = (pair.name, *(f"{name}={value}" for name, value in settings.items() if name in ("kinds", "layers")))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("workshop")
        return Workshop(pair, tasks.get(config.task), config, folders[key])

    return make


@pytest.fixture
def workshop(tiny_pair, workshop_of) -> Workshop:
    """On the Llama."""
    return workshop_of(tiny_pair)
