"""Estimators are found by name, take a source and a shape, and refuse what they have not."""

from __future__ import annotations

import copy

import pytest
import torch

import spd_lens as spd
from spd_lens import estimators, tasks
from spd_lens.estimators import Calibration, Estimator, Shape, registry
from spd_lens.settings import Extraction
from spd_lens.subspaces import Subspace, extract
from tests.helpers import refused


@pytest.fixture(scope="module")
def source(tiny_pair):
    examples = tasks.get("synthetic-math").calibration(8, 1)
    return Calibration(tiny_pair, examples, seed=3, settings=Extraction(engine="twin"))


@pytest.fixture
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    estimators.names()
    monkeypatch.setattr(registry, "_ESTIMATORS", copy.copy(registry._ESTIMATORS))


def test_all_are_found_by_name_controls_last():
    names = estimators.names()
    assert names == [
        "attribution", "attribution-contrast", "completion", "contrast", "fisher", "learned", "no-sink", "paper",
        "prompt", "scored", "whitened", "random",
    ]  # fmt: skip
    for name in names:
        found = spd.estimators.get(name)
        assert found.name == name and found.says and found.is_control == (name == "random")
    with refused("unknown estimator 'papers'", "random"):
        estimators.get("papers")


def test_a_name_is_taken_once_and_names_a_folder(own_registry):
    with refused("already an estimator", "'paper'", "another name"):
        estimators.register(type("Other", (Estimator,), {"name": "paper", "says": "x"}))
    with refused("estimator Other", "'a/b'"):
        estimators.register(type("Other", (Estimator,), {"name": "a/b", "says": "x"}))
    mine = estimators.register(type("Mine", (Estimator,), {"name": "mine", "says": "x"}))
    assert type(estimators.get("mine")) is mine and "mine" in estimators.names()


@pytest.mark.parametrize("shape", [Shape(), Shape(rank=3, per_head=False, center=True), Shape(energy=0.9)])
def test_the_papers_is_bit_for_bit_what_the_moments_give(source, tmp_path, shape):
    found = estimators.get("paper").subspace(source, shape)
    moments = extract(source.pair, source.calibration, engine="twin", progress=False)
    wanted = moments.subspace(
        shape.rank, energy=shape.energy, per_head=shape.per_head, center=shape.center, center_gradients=False
    )
    assert found.save(tmp_path / "a").read_bytes() == wanted.save(tmp_path / "b").read_bytes()


def test_random_directions_have_the_papers_ranks_and_the_sources_seed(source):
    paper, found = (estimators.get(name).subspace(source, Shape(energy=0.8)) for name in ("paper", "random"))
    assert found.ranks == paper.ranks and not found.singular_values
    assert found.origin == {"estimator": "random", "random": 3}
    site = found.sites[0]
    assert torch.equal(found.bases[site], paper.random_like(3).bases[site])
    assert not torch.allclose(found.projector(site), paper.projector(site))


def test_what_estimators_ask_for_is_not_in_the_settings_of_a_calibration(source):
    with refused("sinks", "leave it out"):
        Calibration(source.pair, source.calibration, settings=Extraction(sinks="attended"))
    with refused("labels", "leave it out"):
        Calibration(source.pair, source.calibration, settings=Extraction(labels="sampled"))


def test_a_calibration_extracts_each_combination_once(source, monkeypatch):
    first, wrong = source.gradients(), source.gradients(shuffled=True)
    assert source.gradients() is first and source.gradients(shuffled=True) is wrong
    site = first.sites[0]
    assert not torch.allclose(first.blocks(site), wrong.blocks(site))
    assert wrong.n_examples.sum() == first.n_examples.sum() == 8


@pytest.mark.parametrize("name", ["attribution", "attribution-contrast", "contrast", "fisher", "no-sink", "whitened"])
def test_each_works_on_a_model_and_can_be_kept(source, tmp_path, name):
    found = estimators.get(name).subspace(source, Shape(rank=3))
    kept = Subspace.load(found.save(tmp_path / "subspace.safetensors"))
    assert kept.digest() == found.digest() and kept.origin["estimator"] == name
    assert kept.sites == source.gradients().sites and kept.ranks[kept.sites[0]] == (3, 3)
    assert kept.digest() != estimators.get("paper").subspace(source, Shape(rank=3)).digest()


def test_sampled_labels_are_drawn_with_the_sources_seed(source):
    other = Calibration(source.pair, source.calibration, seed=4, settings=source.settings)
    again = Calibration(source.pair, source.calibration, seed=3, settings=source.settings)
    one, same, two = (own.gradients(labels="sampled").gradient for own in (source, again, other))
    site = next(iter(one))
    assert torch.equal(one[site], same[site]) and not torch.equal(one[site], two[site])
