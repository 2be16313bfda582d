"""Guardrails: each fires at what it is there for and not at its opposite, is noted, and stops a strict run."""

import sys
import warnings
from dataclasses import replace
from statistics import fmean

import pytest
import torch

import spd_lens as spd
from spd_lens.errors import Guardrail, caution, strictly
from spd_lens.evaluation import degeneration, teacher_forced
from spd_lens.generation.record import Record
from spd_lens.runs import guardrails
from spd_lens.runs.experiment import Experiment
from spd_lens.runs.run_dir import Run
from spd_lens.runs.summary import write_summary
from spd_lens.sites import Site
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.policy import Policy
from tests.helpers import refused


@pytest.fixture
def said():
    """What guardrails said so far, as one text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: " ".join(str(one.message) for one in caught if one.category is Guardrail)


@pytest.fixture
def own(tiny_settings, tiny_pair, tmp_path):
    config = spd.SPDConfig.make({**tiny_settings, "model": tiny_pair.name, "engine": "twin"})
    return Experiment(config, tmp_path, pair=tiny_pair)


def records(*completions, finish_reason="eos", length=20):
    return [
        Record(str(i), "p", text, (1, 2), tuple((7 * i + j) % 97 for j in range(length)), finish_reason)
        for i, text in enumerate(completions)
    ]


def test_a_caution_is_a_warning_and_under_strict_an_error(said):
    caution("look at it")
    with strictly(False):
        caution("and again")
    assert said() == "look at it and again"
    with strictly(True), pytest.raises(spd.SPDError, match="stop here"):
        caution("stop here")
    caution("no error any more")
    assert "no error any more" in said()


def test_corpora_that_teach_nothing():
    fine = records(*(f"answer {i}" for i in range(10)))
    assert degeneration(fine) == []
    looping = [replace(record, completion_ids=(1, *(5, 6) * 10)) for record in fine]
    for corpus, words in (
        (records("", " ", *"abcdefgh"), "20% of 10 completions are empty"),
        (records(*"abcdefgh", finish_reason="length"), "100% of 8 completions were cut"),
        (records(*["the same words"] * 6, *"abcd"), "60% of 10 completions are the same text"),
        (looping, "100% of 10 completions end in a loop"),
    ):
        (fault,) = degeneration(corpus)
        assert words in fault
    assert degeneration(records(*"AAAABC", length=2)) == []  # letters may well be the same
    assert len(degeneration(records(*["x"] * 600))) == 1


def test_an_experiment_refuses_to_train_on_one(own, tmp_path):
    with strictly(True), refused("are empty", "training on this corpus"):
        own.finetune(spd.Corpus(records(*[" "] * 4)), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_halves_that_disagree(said, own):
    moments = own.moments()
    site = moments.sites[0]
    subspace = moments.subspace(2)
    # the same gradients in all shards agree, other directions in every second shard do not
    same, width = replace(moments), moments.gradient[site].shape[-1]
    for shards in same.gradient.values():
        shards[:] = shards.sum(dim=0)
    guardrails.check_halves(same, subspace)
    assert not said()
    directions = torch.eye(width, dtype=torch.float64)
    for shards in same.gradient.values():
        for number in range(len(shards)):
            some = directions[[i for i in range(width) if i % 2 == number % 2]]
            shards[number] = some.T @ some
    guardrails.check_halves(same, subspace)
    assert "two halves of the" in said() and "mostly noise" in said()


def test_a_projection_that_leaves_nothing(said, own, monkeypatch):
    subspace = own.moments().subspace(7)
    guardrails.check_policy(own.pair, Policy("projected", subspace))
    guardrails.check_policy(own.pair, Policy("base"))
    assert not said()
    projected = Policy("projected", own.moments().subspace(1))
    texts = guardrails.other_texts(8)
    base, under = teacher_forced(own.pair, texts, [Policy("base"), projected], progress=False).values()
    rise = fmean(item.completion_loss for item in under) - fmean(item.completion_loss for item in base)
    monkeypatch.setattr(guardrails, "EXPLOSION", rise + 0.01)
    guardrails.check_policy(own.pair, projected)
    assert not said()
    monkeypatch.setattr(guardrails, "EXPLOSION", rise - 0.01)
    guardrails.check_policy(own.pair, projected)
    assert "plain prose costs" in said()


def test_items_that_were_trained_on(said, own):
    items, used = own.items("synthetic-math"), [*own.prompts, *own.calibration]
    guardrails.check_items(used, {"synthetic-math": items})
    assert not said()
    spaced = replace(used[0], prompt=used[0].prompt.replace(" ", "  ").upper())
    guardrails.check_items(used, {"fine": items, "own": [*items, spaced]})
    assert f"1 of {len(items) + 1} test items of own" in said() and spaced.name in said()


def test_gradients_of_the_first_token_alone(said, own, monkeypatch):
    module = sys.modules["spd_lens.subspaces.extract"]
    extract(own.pair, own.calibration, engine="twin", progress=False)
    assert "first token" not in said()
    rows = module._rows

    def sunk(*args):
        for one in rows(*args):
            gradient = {site: g * 1e-3 for site, g in one.gradient.items()}
            gradient[Site(3, "v")][0] += 1.0
            yield replace(one, gradient=gradient)

    monkeypatch.setattr(module, "_rows", sunk)
    extract(own.pair, own.calibration, engine="twin", layers=[3], progress=False)
    assert "at 3.v is that of the first token" in said()
    with strictly(True), refused("first token", "no-sink"):
        extract(own.pair, own.calibration, engine="twin", layers=[3], progress=False)


def test_a_folder_keeps_what_was_said_and_says_it_again(finished_run, tmp_path, said):
    run = Run(tmp_path / "run")
    with run.guarded(False):
        caution("the first")
        caution("the first")
    assert run.notes["cautions"] == ["the first"]
    with pytest.raises(Guardrail, match="the first"), run.guarded(True):
        pass
    with pytest.raises(Guardrail, match="the second"), Run(tmp_path / "other").guarded(True):
        caution("the second")
    assert Run(tmp_path / "other").notes["cautions"] == ["the second"]
    assert said() == "the first the first"


def test_a_strict_run_stops_and_the_same_run_goes_on_without(tiny_settings, tiny_pair, tmp_path, said):
    settings = {**tiny_settings, "model": tiny_pair.name, "engine": "twin", "n_train": 2, "n_eval": 2, "epochs": 1}
    strict = spd.SPDConfig.make({**settings, "strict": True})
    with refused("two halves of the 6 calibration examples"):
        spd.run(strict, tmp_path / "run", pair=tiny_pair, progress=False)
    assert not (tmp_path / "run" / "corpus.jsonl").exists()
    again = spd.run(spd.SPDConfig.make(settings), tmp_path / "run", pair=tiny_pair, progress=False)
    halves, cut = again.notes["cautions"]
    assert "two halves" in halves and "cut at the token limit" in cut and "## Doubts" in again.summary
    assert write_summary(again) == again.summary and halves in said() and cut in said()
    with refused("two halves"):  # a finished run is doubted as it was
        spd.run(strict, tmp_path / "run", pair=tiny_pair, progress=False)
