"""Several rounds: each an ordinary run on the model that the last one left, with drift measured and a stop rule."""

from __future__ import annotations

import copy
import shutil

import pandas as pd
import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

import spd_lens.runs
from spd_lens.cli.commands import app
from spd_lens.errors import SPDError
from spd_lens.evaluation.teacher_forced import teacher_forced
from spd_lens.files import read_json, write_json
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.loading import make_tasks
from spd_lens.runs.round_drift import Drift, StopRule, overlap, say
from spd_lens.runs.rounds import Rounds, held_out_items, merged, run_rounds
from spd_lens.sites import Site
from spd_lens.stats.estimate import Estimate
from spd_lens.subspaces.policy import Policy
from spd_lens.subspaces.subspace import Subspace
from tests.helpers import assert_same_bits, refused

NEVER = StopRule(on_rising_loss=False, kl_budget=None)


@pytest.fixture(scope="module")
def config(tiny_settings):
    changes = {
        "n_train": 8,
        "n_eval": 4,
        "n_random": 1,
        "n_compared": 2,
        "policies": ["spd"],
        "epochs": 1,
        "engine": "twin",
    }
    return SPDConfig.make({**tiny_settings, **changes})


@pytest.fixture(scope="module")
def finished(config, tiny_pair, tmp_path_factory) -> Rounds:
    return run_rounds(
        config, tmp_path_factory.mktemp("rounds") / "r", 2, stop=NEVER, n_held_out=12, progress=False, pair=tiny_pair
    )


@pytest.fixture
def folder(finished, tmp_path) -> Rounds:
    shutil.copytree(finished.path, tmp_path / "r")
    return Rounds(tmp_path / "r")


def logits(model, ids=(5, 60, 70, 80, 90)):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits.double()


def test_the_second_round_begins_where_the_first_ended(finished, tiny_pair):
    """Against PEFT itself: the first adapter unmerged, then merged, and the second unmerged on top."""
    first, second = finished.adapters
    after_one = PeftModel.from_pretrained(copy.deepcopy(tiny_pair.hf), first).eval()
    one = logits(after_one)
    assert torch.allclose(logits(finished.model(tiny_pair, 1).hf), one, atol=1e-4)
    after_two = PeftModel.from_pretrained(after_one.merge_and_unload(), second).eval()
    assert torch.allclose(logits(finished.model(tiny_pair).hf), logits(after_two), atol=1e-4)
    assert not torch.allclose(logits(finished.model(tiny_pair).hf), one, atol=1e-2)
    # the runs say so themselves: what the first was after training, the second is to begin with
    spd, base = finished.run(1).effects("synthetic-math")["spd"], finished.run(2).effects("synthetic-math")["base"]
    assert [i.aligned_loss for i in spd] == pytest.approx([i.aligned_loss for i in base], abs=1e-4)
    weights = [finished.run(k).notes["weights"] for k in (1, 2)]
    assert weights[0] == finished.notes["weights"] != weights[1]


def test_rounds_differ_in_their_seed_and_share_their_prompts(finished, config):
    one, two = finished.run(1), finished.run(2)
    assert [one.config.seed, two.config.seed] == [config.seed, config.seed + 1]
    assert [r.id for r in one.corpus] == [r.id for r in two.corpus]
    assert one.summary and two.summary


def test_every_rounds_subspace_is_that_of_its_own_model(finished, tiny_pair, config):
    source, _ = make_tasks(config)
    examples = source.calibration(config.n_calibration, config.data_seed)
    for number in (0, 1, 2):
        model = finished.model(tiny_pair, number)
        wanted = spd_lens.extract(model, examples, engine="twin", progress=False)
        for site, gram in wanted.gradient.items():
            assert torch.allclose(
                finished.moments(number).gradient[site], gram, rtol=1e-3, atol=1e-6 * gram.abs().max()
            )
    moments = finished.run(2).moments.gradient
    assert all(torch.equal(moments[site], finished.moments(1).gradient[site]) for site in moments)
    assert not all(torch.allclose(moments[site], finished.moments(0).gradient[site], rtol=0.05) for site in moments)


def test_drift_is_measured_from_the_first_model_on_items_that_no_run_scores(finished, tiny_pair, config, tmp_path):
    source, _ = make_tasks(config)
    items = held_out_items(config, source, 12)
    assert len(items) == 12
    assert not {i.id for i in items} & {i.id for i in finished.run(1).result("synthetic-math", "spd").items}
    one_adapter = teacher_forced(tiny_pair, items, [Policy("p", adapter=finished.adapters[0])], progress=False)["p"]
    for found, wanted in zip(finished.effects(1), one_adapter, strict=True):
        assert found.id == wanted.id
        assert found.aligned_loss == pytest.approx(wanted.aligned_loss, abs=1e-4)
        assert found.kl == pytest.approx(wanted.kl, rel=1e-3, abs=1e-6)
    assert all(item.kl == pytest.approx(0, abs=1e-6) for item in finished.effects(0))
    table = finished.table.set_index("round")
    assert list(table.index) == [1, 2]
    means = [sum(i.aligned_loss for i in finished.effects(k)) / 12 for k in range(3)]
    assert table.loss_change.tolist() == pytest.approx([means[1] - means[0], means[2] - means[1]])
    assert table.loss_change_in_all[2] == pytest.approx(means[2] - means[0])
    assert table.kl[2] > table.kl[1] > 0
    assert (table.overlap_by_chance == 0.5).all() and (table.overlap_by_chance < table.overlap).all()
    sentence = say(finished.table, None)
    assert f"KL from the first model {table.kl[2]:.4f}" in sentence and "chance 0.50" in sentence


def test_overlap_is_a_share_of_directions():
    eye = torch.eye(8, dtype=torch.float64)
    at = Site(0, "k")

    def of(columns):
        return Subspace({at: eye[None, :, columns]}, {at: (len(columns),)})

    assert overlap(of([0, 1, 2, 3]), of([0, 1, 2, 3])) == 1
    assert overlap(of([0, 1, 2, 3]), of([2, 3, 4, 5])) == 0.5
    assert overlap(of([0, 1]), of([2, 3])) == 0
    random = [overlap(of([0, 1, 2]), of([0, 1, 2, 3]).random_like(seed)) for seed in range(300)]
    assert sum(random) / 300 == pytest.approx(4 / 8, abs=0.03)


def test_the_models_are_left_as_they_were(config, tiny_pair, finished, state_of, folder):
    state = state_of(tiny_pair.hf)
    shutil.rmtree(folder.path / "after-2")
    run_rounds(config, folder.path, 2, stop=NEVER, n_held_out=12, progress=False, pair=tiny_pair)
    assert_same_bits(tiny_pair.hf, state)


def test_killed_rounds_go_on_and_end_alike(config, tiny_pair, finished, folder, monkeypatch):
    for gone in ("after-2", "round-2/adapter", "round-2/effects", "round-2/eval", "rounds.csv", "after-1/effects.json"):
        path = folder.path / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with monkeypatch.context() as patch:  # what is there is not made again
        patch.setattr("spd_lens.runs.experiment.generate", None)
        again = run_rounds(config, folder.path, 2, stop=NEVER, n_held_out=12, progress=False, pair=tiny_pair)
    pd.testing.assert_frame_equal(again.table, finished.table)
    assert (again.adapters[1] / "adapter_model.safetensors").read_bytes() == (
        finished.adapters[1] / "adapter_model.safetensors"
    ).read_bytes()


def test_a_model_named_by_a_relative_path(config, tiny_llama_dir, tiny_pair, tmp_path, monkeypatch):
    """Each round is given the pair, whose name is the whole path."""
    monkeypatch.chdir(tiny_llama_dir.parent)
    named = config.model_copy(update={"model": f"./{tiny_llama_dir.name}"})
    options = {"stop": NEVER, "n_held_out": 4, "progress": False}
    done = run_rounds(named, tmp_path / "r", 1, **options)
    assert done.run(1).config.model == named.model and done.run(1).summary
    again = run_rounds(named, tmp_path / "r", 1, pair=tiny_pair, **options)
    pd.testing.assert_frame_equal(again.table, done.table)
    with refused("model", "there"):
        spd_lens.run(done.run(1).config.model_copy(update={"model": "elsewhere"}), done.run(1).path)


def test_the_first_models_subspace_throughout(config, tiny_pair, folder):
    shutil.rmtree(folder.path / "round-2")
    shutil.rmtree(folder.path / "after-2")
    (folder.path / "rounds.json").unlink()
    (folder.path / "rounds.json").write_text("{}")
    again = run_rounds(
        config, folder.path, 2, reextract="first", stop=NEVER, n_held_out=12, progress=False, pair=tiny_pair
    )
    first, second = again.run(1).subspace, again.run(2).subspace
    assert all(torch.equal(first.bases[site], second.bases[site]) for site in first.sites)
    assert again.table.overlap[1] < 1  # of the model's own subspace, which is measured all the same


def estimate(value, low, high):
    return Estimate(value, low, high, 10, "")


def made(loss_change, in_all=(0.0, -1.0, 1.0), kl=0.1):
    return Drift(1, estimate(1, 0, 2), estimate(*loss_change), estimate(*in_all), estimate(kl, 0, 1), 0.9, 0.9, 0.5)


@pytest.mark.parametrize(
    ("after", "rule", "words"),
    [
        (made((0.1, 0.05, 0.2)), StopRule(), "last round's"),
        (made((0.1, -0.05, 0.2)), StopRule(), None),
        (made((-0.2, -0.3, -0.1)), StopRule(), None),
        (made((0.1, -0.1, 0.2), in_all=(0.3, 0.1, 0.5)), StopRule(), "first model's"),
        (made((0.1, 0.05, 0.2)), NEVER, None),
        (made((0, -1, 1), kl=1.5), StopRule(), "budget of 1"),
        (made((0, -1, 1), kl=1.5), StopRule(kl_budget=2.0), None),
        (made((0.1, -float("inf"), float("inf"))), StopRule(), None),
    ],
)
def test_when_to_stop(after, rule, words):
    reason = rule.reason(after)
    assert reason is None if words is None else words in reason


def test_a_rule_that_fires_ends_the_rounds(config, tiny_pair, folder, tmp_path):
    place = tmp_path / "stopping"
    place.mkdir()
    for part in ("round-1", "after-0", "after-1"):
        shutil.copytree(folder.path / part, place / part)
    (place / "rounds.json").write_text("{}")
    rule = StopRule(on_rising_loss=False, kl_budget=1e-9)
    stopped = run_rounds(config, place, 3, stop=rule, n_held_out=12, progress=False, pair=tiny_pair)
    assert len(stopped.adapters) == 1 and "budget" in stopped.notes["stopped"]
    assert "Stopped" in say(stopped.table, stopped.notes["stopped"])


def test_rounds_of_a_version_with_fewer_settings_go_on(config, tiny_pair, folder):
    notes = read_json(folder.path / "rounds.json")
    del notes["settings"]["config"]["too_long"]
    write_json(folder.path / "rounds.json", notes)
    with refused("settings"):
        run_rounds(config, folder.path, 1, stop=StopRule(), n_held_out=12, progress=False, pair=tiny_pair)
    run_rounds(config, folder.path, 1, stop=NEVER, n_held_out=12, progress=False, pair=tiny_pair)
    assert folder.notes["settings"] == notes["settings"]


def test_mistakes_are_sentences(config, tiny_pair, finished, tmp_path):
    def refusing(*words, out=None, change=None, **options):
        own = config.model_copy(update=change or {})
        with refused(*words):
            run_rounds(own, out or tmp_path / "new", **{"progress": False, "pair": tiny_pair, **options})

    refusing("dtype", "bfloat16", "float32", change={"dtype": "bfloat16"}, pair=None)
    refusing("n_rounds", "0", n_rounds=0)
    refusing("reextract", "'last'", reextract="last")
    refusing("held-out", "n_held_out", n_held_out=1)
    refusing("settings", out=finished.path, n_held_out=12, stop=StopRule())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    refusing("does not hold rounds", out=tmp_path / "other")
    with refused("kl_budget", "-1"):
        StopRule(kl_budget=-1)
    with pytest.raises(SPDError, match="no model after 3"):
        finished.model(tiny_pair, 3)
    assert not (tmp_path / "new").exists()


def test_merged_is_a_model_of_its_own(finished, tiny_pair, state_of):
    state = state_of(tiny_pair.hf)
    other = merged(tiny_pair, finished.adapters[0])
    assert other.hf is not tiny_pair.hf and other.format.name == tiny_pair.format.name
    assert_same_bits(tiny_pair.hf, state)


def test_the_command_hands_everything_on(monkeypatch, finished, tmp_path):
    asked = {}

    def pretended(config, out, n_rounds, **options):
        asked.update(options, config=config, out=out, n_rounds=n_rounds)
        return finished

    monkeypatch.setattr(spd_lens.runs, "run_rounds", pretended)
    flags = "rounds --rounds 5 --reextract first --kl-budget 0 --no-stop-on-loss --n-held-out 9 --rank 4 --quiet"
    result = CliRunner().invoke(app, [*flags.split(), "--out", str(tmp_path)])
    assert result.exit_code == 0 and "Round 2: aligned loss" in " ".join(result.output.split())
    assert asked["stop"] == NEVER and asked["config"].rank == 4
    assert (asked["n_rounds"], asked["reextract"], asked["n_held_out"]) == (5, "first", 9)
