"""Estimators and spans in runs, studies, extractions and analyses: an experiment is a source like any other."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import spd_lens as spd
from spd_lens import estimators
from spd_lens.analysis.common.subject import Subject
from spd_lens.files import write_text
from spd_lens.runs import Run, run
from spd_lens.runs import experiment as module
from spd_lens.runs.experiment import Experiment
from spd_lens.runs.rounds import run_rounds
from tests.helpers import refused

NAMES = (
    "paper",
    "no-sink",
    "prompt",
    "contrast",
    "attribution",
    "attribution-contrast",
    "whitened",
    "fisher",
    "random",
)


@pytest.fixture
def config(tiny_settings, tiny_pair):
    return spd.SPDConfig.make({**tiny_settings, "model": tiny_pair.name, "engine": "twin"})


@pytest.fixture
def own(config, tiny_pair, tmp_path):
    return Experiment(config, tmp_path, pair=tiny_pair)


def files(folder):
    return {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.safetensors")}


@pytest.fixture
def no_extraction(monkeypatch):
    monkeypatch.setattr(module, "extract", None)


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_gives_what_a_model_and_examples_give(own, name):
    source = estimators.Calibration(own.pair, own.calibration, own.seed, own.config.extraction)
    wanted = estimators.get(name).subspace(source, estimators.Shape(own.config.rank))
    found = own.subspace(estimator=name)
    assert found.digest() == wanted.digest() and found.origin == wanted.origin
    by_setting = own.varied(config=own.config.model_copy(update={"estimator": name})).subspace()
    assert by_setting.digest() == wanted.digest()


def test_files_say_what_is_in_them_and_what_keeps_more_serves(own, tmp_path, monkeypatch):
    own.subspace(estimator="no-sink"), own.subspace(estimator="fisher"), own.subspace(estimator="attribution-contrast")
    # the plain file is written by whoever comes first, with what it asks for
    wanted = {"moments", "analysis/moments-cross", "analysis/moments-shuffled-42", "analysis/moments-sampled-labels-42"}
    assert files(tmp_path) == wanted
    assert own.moments().kept == ("classes",) and own.moments(keep=["cross"]).kept == ("cross",)
    own.moments(keep=["classes"], sinks="attended"), own.moments(keep=["cross", "classes"])
    more = {"analysis/moments-attended-sinks", "analysis/moments-classes-cross"}
    assert files(tmp_path) == wanted | more
    shutil.rmtree(tmp_path / "analysis" / "none", ignore_errors=True)
    (tmp_path / "analysis" / "moments-cross.safetensors").unlink()
    monkeypatch.setattr(module, "extract", None)  # another extraction would fail
    again = own.varied(_loaded={})
    assert again.moments(keep=["cross"]).kept == ("classes", "cross")
    assert again.subspace(estimator="scored").digest() == own.subspace(estimator="scored").digest()
    with refused("unknown keep 'class'", "classes, cross"):
        own.moments(keep=["class"])


def test_seeds_of_labels_are_told_apart(own):
    first, second = (own.with_seed(seed).gradients(labels="sampled") for seed in (1, 2))
    site = first.sites[0]
    assert not torch.equal(first.gradient[site], second.gradient[site])
    assert torch.equal(
        own.with_seed(1).varied(_loaded={}).gradients(labels="sampled").gradient[site], first.gradient[site]
    )


def test_what_is_known_beforehand_is_extracted_at_once(own, tmp_path):
    first = own.varied(keep=("cross", "classes"))
    for name in ("paper", "no-sink", "attribution"):
        first.subspace(estimator=name)
    assert files(tmp_path) == {"moments"}


def test_moments_in_hand_serve_or_are_refused(own):
    moments = own.moments(keep=["classes", "cross"])
    for name in ("no-sink", "attribution", "whitened"):
        assert own.subspace(moments, estimator=name).digest() == own.subspace(estimator=name).digest()
    with refused("no gradients towards shuffled answers"):
        own.subspace(moments, estimator="contrast")
    with refused("--labels sampled"):
        own.subspace(moments, estimator="fisher")
    with refused("no cross", "--keep cross"):
        own.subspace(own.extract(), estimator="attribution")


def test_calibration_examples_have_the_spans_asked_for_and_items_their_own(own):
    other = own.varied(config=own.config.model_copy(update={"span": "results"}))
    # an example without a result of its own is left out, and others are drawn in its place
    wanted = {e.id: e for e in own.task.calibration(12, own.config.data_seed)}
    assert len(other.calibration) == 6
    for example in other.calibration:
        assert example.spans == wanted[example.id].marks["results"] != wanted[example.id].spans
    assert other.prompts == own.prompts
    assert [i.spans for i in other.items("synthetic-math")] == [i.spans for i in own.items("synthetic-math")]
    with refused("synthetic-math", "'reslts'"):
        own.varied(config=own.config.model_copy(update={"span": "reslts"})).calibration  # noqa: B018


@pytest.fixture(scope="module")
def other_run(tiny_settings, tmp_path_factory):
    settings = {**tiny_settings, "estimator": "no-sink", "span": "results", "engine": "twin", "policies": ["base"]}
    return run(spd.SPDConfig.make(settings), tmp_path_factory.mktemp("other") / "run", progress=False)


def test_a_run_with_another_estimator_says_so_everywhere(other_run, caplog):
    assert files(other_run.path) >= {"moments", "subspace"} and not files(other_run.path / "analysis")
    assert other_run.moments.kept == ("classes",)
    assert other_run.subspace.origin["estimator"] == "no-sink"
    wanted = other_run.moments.region("prompt", "completion", "scored").subspace(other_run.config.rank)
    assert other_run.subspace.digest() == wanted.digest()
    assert "estimator `no-sink`; " in other_run.summary and "spans `results`" in other_run.summary
    assert other_run.config.departures == {
        name: both for name, both in other_run.config.departures.items() if name not in ("estimator", "span")
    } | {"estimator": ("paper", "no-sink"), "span": (None, "results")}
    with refused("estimator: 'no-sink' there, 'paper' now"):
        Run(other_run.path).check(other_run.config.model_copy(update={"estimator": "paper"}))
    subject = Subject(other_run, progress=False)
    for _ in range(2):
        assert subject.rank("4") == 4 and subject.moments.sites
        subject.say_estimator()
    assert [r.getMessage().count("'no-sink'") for r in caplog.records if "run with estimator" in r.getMessage()] == [1]


def test_moments_of_a_run_without_its_model_name_the_flag(other_run, tmp_path):
    copied = shutil.copytree(other_run.path, tmp_path / "copy")
    experiment = Experiment.opened(Run(copied), progress=False)
    assert experiment.subspace(estimator="prompt").ranks  # what is there needs no model
    text = (copied / "config.yaml").read_text().replace(f"model: {other_run.config.model}", "model: no/such-model")
    write_text(copied / "config.yaml", text)
    with refused("cross", "no/such-model", "--keep cross"):
        Experiment.opened(Run(copied), progress=False).subspace(estimator="attribution")
    assert files(copied) == files(other_run.path)


def test_a_run_of_a_version_without_the_settings_goes_on(finished_run, tmp_path, no_extraction):
    copied = shutil.copytree(finished_run.path, tmp_path / "copy")
    lines = (copied / "config.yaml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.partition(":")[0] not in ("estimator", "span")]
    assert len(lines) - len(kept) == 2
    write_text(copied / "config.yaml", "".join(kept))
    assert run(finished_run.config, copied, progress=False).subspace.digest() == finished_run.subspace.digest()


def test_unknown_estimators_are_refused_before_anything(tiny_settings):
    with refused("unknown estimator 'papr'", "no-sink"):
        spd.SPDConfig.make({**tiny_settings, "estimator": "papr"})


def test_rounds_from_the_first_models_moments_need_the_papers_estimator(config, tiny_pair, tmp_path):
    other = config.model_copy(update={"estimator": "contrast"})
    with refused("'contrast'", "reextract='current'"):
        run_rounds(other, tmp_path / "rounds", 1, reextract="first", pair=tiny_pair, progress=False)
    assert not (tmp_path / "rounds").exists()


def test_origin_of_the_papers_subspace_names_no_estimator(finished_run):
    assert "estimator" not in finished_run.subspace.origin
    assert "estimator" not in json.dumps(finished_run.moments.settings)
