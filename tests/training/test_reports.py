"""Losses that also go to a tracker: what transformers knows, what is refused, and that it changes no result."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, is_tensorboard_available

from spd_lens.generation.generate import generate
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.preflight import check_settings
from spd_lens.training import reports
from spd_lens.training.finetune import finetune
from tests.helpers import refused

OPTIONS = {"lr": 1e-3, "epochs": 2, "batch_size": 4, "progress": False}


@pytest.fixture
def installed(monkeypatch):
    """Which trackers are installed; the file system has no say."""
    names = []
    monkeypatch.setattr(reports, "get_available_reporting_integrations", lambda: names)
    return names


def test_names_are_checked_before_anything_is_done(installed):
    installed.append("trackio")
    assert reports.trackers("none") == []
    with refused("'tensorbored'", "tensorboard, trackio, wandb"):
        reports.trackers("trackio,tensorbored")
    with refused("'none'"):
        reports.trackers("trackio,none")
    with refused("'comet_ml'", "not installed", "pip install comet-ml"):
        check_settings(SPDConfig.make({"report_to": "comet_ml", "device": "cpu"}))
    installed.append("comet_ml")
    assert reports.trackers("trackio, comet_ml") == ["trackio", "comet_ml"]


def test_a_tracker_gets_every_loss_and_changes_nothing(tiny_pair, tiny_prompts, tmp_path, monkeypatch, installed):
    seen, corpus = [], generate(tiny_pair, tiny_prompts, max_new_tokens=8, seed=9, progress=False)

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append((args.run_name, args.project, state.global_step, logs.get("loss")))

    installed.append("wandb")
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    plain = finetune(tiny_pair, corpus, out=tmp_path / "plain", **OPTIONS)
    assert not seen
    watched = finetune(tiny_pair, corpus, out=tmp_path / "watched", report_to="wandb", **OPTIONS)
    log = json.loads((watched / "training.json").read_text())["log"]
    assert [entry for entry in seen if entry[-1] is not None] == [
        ("watched", "spd_lens", entry["step"], entry["loss"]) for entry in log
    ]
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (watched, plain))
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    assert finetune(tiny_pair, corpus, out=watched, **OPTIONS) == watched  # finished, wherever it reported to


@pytest.mark.skipif(not is_tensorboard_available(), reason="tensorboard is not installed")
def test_tensorboards_files_stay_beside_the_adapter(tiny_pair, tiny_prompts, tmp_path):
    corpus = generate(tiny_pair, tiny_prompts, max_new_tokens=8, seed=9, progress=False)
    finetune(tiny_pair, corpus, out=tmp_path / "out", report_to="tensorboard", **OPTIONS)
    [file] = (tmp_path / "out.tensorboard").glob("events.out.tfevents.*")
    assert b"train/loss" in file.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.tensorboard"}


def test_a_run_takes_another_tracker_when_it_goes_on():
    plain, watched = (SPDConfig.make({"report_to": name}) for name in ("none", "wandb"))
    assert not plain.differences(watched)
