"""`Experiment`: what is made of settings, model, tasks and a folder is made once, and the model is loaded once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import spd_lens as spd
from spd_lens.files import read_json, write_json
from spd_lens.models import weights_digest
from spd_lens.runs import experiment as module
from spd_lens.runs import loading
from spd_lens.runs.experiment import Experiment
from spd_lens.runs.run_dir import Run
from spd_lens.subspaces.policy import Policy
from tests.helpers import refused


@pytest.fixture
def config(tiny_settings, tiny_pair):
    return spd.SPDConfig.make({**tiny_settings, "model": tiny_pair.name, "engine": "twin"})


@pytest.fixture
def own(config, tiny_pair, tmp_path):
    return Experiment(config, tmp_path, pair=tiny_pair)


def test_moments_are_extracted_once_and_kept_where_their_name_says(own, config, tiny_pair, tmp_path, monkeypatch):
    plain, everywhere, wrong = own.moments(), own.moments(layers="all"), own.moments(shuffled=True, seed=3)
    assert len(everywhere.sites) > len(plain.sites) == len(wrong.sites)
    names = {"moments", "analysis/moments-all-layers", "analysis/moments-shuffled-3"}
    assert {str(p.relative_to(tmp_path).with_suffix("")) for p in tmp_path.rglob("*.safetensors")} == names
    monkeypatch.setattr(module, "extract", None)  # a second extraction would fail
    assert own.moments() is own.with_seed(5).moments() is plain
    again = Experiment(config, tmp_path, pair=tiny_pair)
    for site in plain.sites:
        assert torch.equal(again.moments().gradient[site], plain.gradient[site])
        assert not torch.equal(again.moments(shuffled=True, seed=3).gradient[site], plain.gradient[site])


def test_an_extraction_of_something_else_is_refused_though_it_is_in_memory(own, tiny_qwen2_pair):
    own.moments()
    with refused("moments.safetensors", "another model"):
        own.varied(pair=tiny_qwen2_pair).moments()
    with refused("moments.safetensors", "another folder"):
        own.varied(config=own.config.model_copy(update={"kinds": ["k"]})).moments()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_calibration_tokens": 200}, ["max_calibration_tokens", "200"]),
        ({"span_rule": "inside"}, ["span_rule", "inside"]),
        ({"prompt_format": "verbatim"}, ["prompt_format", "verbatim"]),
        ({"add_special_tokens": False}, ["add_special_tokens", "False"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("first", ["usual", "other"])
def test_an_extraction_of_texts_that_were_read_in_another_way_is_refused(config, tmp_path, changes, said, first):
    usual = Experiment(config.model_copy(update={"loss": "full"}), tmp_path)  # no span of these need lie on tokens
    other = usual.varied(config=usual.config.model_copy(update=changes), _loaded={})
    vars(other).pop("pair", None)
    begun, later = (usual, other) if first == "usual" else (other, usual)
    begun.moments()
    with refused("moments.safetensors", *said, "another folder"):
        later.moments()
    with refused("moments.safetensors", *said, "another folder"):
        later.varied(_loaded={}).moments()
    assert begun.moments().sites


def test_the_subspace_is_taken_as_the_settings_say(own):
    moments = own.moments()
    changes = {"energy": 0.9, "center_gradients": True, "per_head": False}
    asked = own.varied(config=own.config.model_copy(update=changes)).subspace()
    wanted = moments.subspace(energy=0.9, center_gradients=True, per_head=False)
    assert (asked.digest(), asked.origin) == (wanted.digest(), wanted.origin)
    assert asked.digest() != own.subspace().digest()


def test_a_policy_is_generated_under_whole(own, tmp_path):
    policy = Policy("projected", own.subspace(), 0.5)
    corpus = own.generate(tmp_path / "a.jsonl", policy, own.prompts[:3], sampling={"temperature": 1.2})
    wanted = spd.generate(
        own.pair, own.prompts[:3], subspace=policy.subspace, strength=0.5, temperature=1.2, seed=own.config.seed,
        max_new_tokens=own.config.max_new_tokens, progress=False,
    )  # fmt: skip
    assert [r.completion_ids for r in corpus] == [r.completion_ids for r in wanted]
    plain = own.generate(tmp_path / "b.jsonl", None, own.prompts[:3], sampling={"temperature": 1.2})
    assert [r.completion_ids for r in plain] != [r.completion_ids for r in corpus]


def test_experiments_of_one_model_load_it_once(finished_run, tmp_path, monkeypatch):
    paths = [shutil.copytree(finished_run.path, tmp_path / name) for name in ("a", "b", "c")]
    found = [Experiment.opened(Run(path), progress=False) for path in paths]
    notes = read_json(paths[2] / "run.json")
    write_json(paths[2] / "run.json", {**notes, "weights": "others"})
    for experiment in found:
        experiment.models = found[0].models
        assert experiment.moments().sites and not experiment.models  # what is there needs no model
    first = found[0].pair
    monkeypatch.setattr(loading, "load", None)  # a second model would fail
    assert found[1].pair is first
    with refused("no longer has the weights", str(paths[2])):
        _ = found[2].pair


def test_a_subspace_says_which_model_and_examples_it_is_of_and_no_path(own, tmp_path):
    found = own.subspace()
    known = found.provenance
    assert known["model"] == Path(own.config.model).name and "/" not in known["model"]
    assert known["weights"] == weights_digest(own.pair.hf) and known["data"] == own.task.sources()
    assert known["examples"] == module.examples_digest(own.calibration)
    fewer = own.varied(config=own.config.model_copy(update={"n_calibration": 2}))
    assert module.examples_digest(fewer.calibration) != known["examples"]
    assert spd.Subspace.load(found.save(tmp_path / "s.safetensors")).provenance == known
    # of moments that a caller brings nobody knows what they are of
    assert own.subspace(own.moments(shuffled=True)).provenance == {}
