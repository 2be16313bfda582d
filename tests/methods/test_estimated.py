"""Every estimator is a method, also one that a user registers later."""

from __future__ import annotations

import copy

import pytest

from spd_lens import estimators, methods
from spd_lens.estimators import registry as of_estimators
from spd_lens.methods import registry as of_methods
from spd_lens.runs import SPDConfig, run
from spd_lens.study.config import StudyConfig, may_project
from spd_lens.study.engine import experiments_of, run_study
from tests.helpers import refused


@pytest.fixture
def own_registries(monkeypatch):
    """What a test registers is gone after it."""
    methods.names()
    monkeypatch.setattr(of_methods, "_METHODS", copy.copy(of_methods._METHODS))
    monkeypatch.setattr(of_estimators, "_ESTIMATORS", copy.copy(of_estimators._ESTIMATORS))


def test_every_estimator_but_two_is_a_method_of_its_name(experiment):
    found = [name for name in estimators.names() if name not in ("paper", "random")]
    assert {"no-sink", "attribution", "contrast"} <= {*found} <= {name.removeprefix("spd-") for name in methods.names()}
    assert "spd-paper" not in methods.names()
    for name in found:
        method, estimator = methods.get(f"spd-{name}"), estimators.get(name)
        assert method.needs == estimator.needs and estimator.says in method.says and may_project(f"spd-{name}")
    policy = methods.get("spd-no-sink").projection(experiment)
    assert policy.subspace.digest() == experiment.subspace(estimator="no-sink").digest()
    assert policy.subspace.digest() != experiment.subspace().digest()
    assert (policy.name, policy.strength) == ("spd-no-sink", experiment.config.strength)


def test_a_users_estimator_is_a_method_at_once(own_registries, experiment):
    @estimators.register
    class Mine(estimators.Estimator):
        name = "mine"
        says = "the prompt's and the paper's together"
        needs = {"keep": ("classes",)}

        def estimate(self, source, shape):
            return super().estimate(source, shape)[:1]

    assert "spd-mine" in methods.names()
    assert {rank for ranks in experiment.subspace(estimator="mine").ranks.values() for rank in ranks} == {1}
    assert StudyConfig.make({"sources": ["synthetic-math"], "methods": ["spd-mine"]}).trained == ["spd-mine"]


def test_a_study_extracts_once_for_all_its_methods(tmp_path):
    asked = {"sources": ["synthetic-math"], "methods": ["spd", "spd-no-sink", "spd-attribution", "spd-fisher"]}
    [experiment] = experiments_of(StudyConfig.make(asked), tmp_path).values()
    assert experiment.keep == ("classes", "cross")
    [plain] = experiments_of(StudyConfig.make({"sources": ["synthetic-math"]}), tmp_path).values()
    assert plain.keep == ()


def test_shapes_that_an_estimator_cannot_give_are_refused_before_anything(tmp_path, tiny_llama_dir):
    settings = {"model": str(tiny_llama_dir), "energy": 0.9}
    asked = {"sources": ["synthetic-math"], "methods": ["spd-attribution"], "settings": settings}
    with refused("'attribution'", "energy", "rank"):
        run_study(StudyConfig.make(asked), tmp_path / "study")
    with refused("'attribution'", "energy", "rank"):
        run(SPDConfig.make({**settings, "task": "synthetic-math", "estimator": "attribution"}), tmp_path / "run")
    assert not any(tmp_path.iterdir())


def test_a_study_names_estimators_by_its_methods():
    with refused("'estimator'", "methods"):
        StudyConfig.make({"sources": ["synthetic-math"], "settings": {"estimator": "no-sink"}})
    assert "estimator" not in StudyConfig.make({"sources": ["synthetic-math"]}).settings
    with refused("spd-no-sunk", "spd-no-sink"):
        StudyConfig.make({"sources": ["synthetic-math"], "methods": ["spd-no-sunk"]})
