"""A study of seconds on the tiny model, run once and shared: copy it before writing into it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from spd_lens.models.pair import ModelPair
from spd_lens.runs import experiment
from spd_lens.study.config import StudyConfig
from spd_lens.study.engine import run_study
from spd_lens.study.folder import Study


@contextlib.contextmanager
def counting() -> Iterator[dict[str, Any]]:
    """How often the expensive library calls, which do their work, are made meanwhile; of `forced` the policies."""
    made: dict[str, Any] = {"extract": 0, "generate": 0, "finetune": 0, "forced": []}
    with pytest.MonkeyPatch.context() as patch:

        def count(module: ModuleType, name: str, key: str) -> None:
            function = getattr(module, name)

            def call(*args: Any, **options: Any) -> Any:
                made[key] += [[p.name.partition(" ")[0] for p in args[2]]] if key == "forced" else 1
                return function(*args, **options)

            patch.setattr(module, name, call)

        count(experiment, "extract", "extract")
        count(experiment, "generate", "generate")
        count(experiment, "finetune", "finetune")
        count(experiment, "teacher_forced", "forced")
        yield made


@pytest.fixture(scope="session")
def study_settings(tiny_llama_dir: Path) -> dict[str, Any]:
    """Three methods, two seeds, two targets, side effects: everything that a study does, in little."""
    return {
        "methods": ["base", "psr", "spd"],
        "sources": ["synthetic-math"],
        "targets": ["synthetic-math", "synthetic-qa"],
        "seeds": [1, 2],
        "n_forced": {"synthetic-math": 6, "synthetic-qa": 5},
        "n_side_effects": 2,
        "score_projected": True,
        "task_options": {"synthetic-math": {"max_new_tokens": 8}, "synthetic-qa": {"max_new_tokens": 4}},
        "settings": {
            "model": str(tiny_llama_dir),
            "dtype": "float32",
            "device": "cpu",
            "n_calibration": 4,
            "n_train": 6,
            "n_eval": 4,
            "max_new_tokens": 8,
            "generation_batch_size": 4,
            "train_batch_size": 3,
            "epochs": 1,
            "lr": 0.01,
        },
    }


@pytest.fixture(scope="session")
def study_of(study_settings: dict[str, Any]) -> Callable[..., StudyConfig]:
    """`study_of(seeds=[1], settings={"n_train": 4})`: the study with some settings changed."""

    def make(**changes: Any) -> StudyConfig:
        settings = {**study_settings["settings"], **changes.pop("settings", {})}
        return StudyConfig.make({**study_settings, **changes, "settings": settings})

    return make


@pytest.fixture(scope="session")
def finished_study(
    study_of: Callable[..., StudyConfig], tiny_pair: ModelPair, tmp_path_factory: pytest.TempPathFactory
) -> Study:
    """A study that was never disturbed; `.calls` is how often the expensive library calls were made for it."""
    with counting() as calls:
        study = run_study(study_of(), tmp_path_factory.mktemp("study") / "study", pair=tiny_pair)
    study.calls = calls  # type: ignore[attr-defined]  # a note for the tests
    return study


@pytest.fixture
def copied_study(finished_study: Study, tmp_path: Path) -> Study:
    """The finished study in a folder of the test's own, times of its files kept."""
    shutil.copytree(finished_study.path, tmp_path / "study")
    return Study(tmp_path / "study")
