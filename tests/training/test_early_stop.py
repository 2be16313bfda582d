"""Stopping early: what is decided, what is kept on disk, and that neither a kill nor damage changes a bit of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spd_lens.files import read_json
from spd_lens.generation.corpus import Corpus
from spd_lens.generation.generate import generate
from spd_lens.training.checkpoint_dir import LOG
from spd_lens.training.early_stop import best_epoch, is_over
from spd_lens.training.finetune import finetune
from spd_lens.training.trainer import CorpusTrainer
from tests.helpers import refused

PER_EPOCH = 3
LORA = {"method": "lora", "lr": 0.1}
FULL = {"method": "full", "lr": 1.0, "warmup_epochs": 6.0}
"""Rates at which the loss of this corpus falls for some epochs, and rises again."""
OPTIONS = {"epochs": 8, "batch_size": 2, "warmup_epochs": 0.5, "early_stop": True, "progress": False}
METHODS = pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])


@pytest.fixture(scope="module")
def corpus(tiny_pair, tiny_prompts, tmp_path_factory) -> Corpus:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    return generate(
        tiny_pair, tiny_prompts, max_new_tokens=24, temperature=3.0, top_p=1.0, seed=9, progress=False, path=path
    )


def trained(pair, corpus, out: Path, method, **options) -> Path:
    return finetune(pair, corpus, out=out, **OPTIONS | method | options)


def summary_of(out: Path) -> dict:
    return {name: value for name, value in read_json(out / LOG).items() if name != "seconds"}


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    [file] = out.glob("*.safetensors")
    return load_file(file)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(tiny_pair, corpus, tmp_path_factory):
    """A whole training of each method, with the weights at the end of each of its epochs."""

    def of(method):
        ends = {}

        def keeping(self, *args, **kwargs):
            result = step(self, *args, **kwargs)
            epoch, rest = divmod(self.state.global_step, PER_EPOCH)
            if not rest:  # what the next epoch begins with
                named = self.model.named_parameters()
                ends[epoch] = {name.replace(".default", ""): w.detach().clone() for name, w in named if w.requires_grad}
            return result

        def step(self, *args, **kwargs):
            return original(self, *args, **kwargs)

        original = CorpusTrainer._maybe_log_save_evaluate
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CorpusTrainer, "_maybe_log_save_evaluate", keeping)
            out = trained(tiny_pair, corpus, tmp_path_factory.mktemp("undisturbed") / "out", method)
        return out, ends

    return {method["method"]: of(method) for method in (LORA, FULL)}


def test_which_epoch_is_the_best_and_when_it_is_over():
    for losses, best, over in [
        ([3.0], 1, False),
        ([3.0, 2.0], 2, False),
        ([3.0, 2.0, 2.0], 2, True),  # not lower is not better
        ([3.0, 2.0, 2.5], 2, True),
        ([3.0, 3.0], 1, True),
        ([3.0, 2.0, 1.0], 3, False),
    ]:
        assert (best_epoch(losses), is_over(losses)) == (best, over)
    assert not is_over([])


@METHODS
def test_the_result_is_the_best_epochs_and_training_json_says_so(undisturbed, method):
    out, ends = undisturbed[method["method"]]
    summary = summary_of(out)
    losses = [entry["loss"] for entry in summary["log"]]
    means = [sum(losses[i : i + PER_EPOCH]) / PER_EPOCH for i in range(0, len(losses), PER_EPOCH)]
    best = means.index(min(means)) + 1
    assert 2 <= best == len(means) - 1 < OPTIONS["epochs"] - 1
    assert summary["early_stop"] == {"epoch": best, "losses": pytest.approx(means), "stopped_early": True}
    assert summary["n_steps"] == len(losses) == PER_EPOCH * (best + 1)
    assert summary["settings"]["early_stop"] is True
    found = weights_of(out)
    assert same(found, {name: value for name, value in ends[best].items() if name in found})
    assert not same(found, {name: value for name, value in ends[best + 1].items() if name in found})
    assert not out.with_name("out.training").exists()
    assert not any(path.is_dir() or path.name == "complete" for path in out.iterdir())


def test_a_loss_that_falls_to_the_end_is_trained_to_the_end(tiny_pair, corpus, tmp_path):
    options = {"lr": 1e-3, "epochs": 2}
    out = trained(tiny_pair, corpus, tmp_path / "early", LORA, **options)
    plain = trained(tiny_pair, corpus, tmp_path / "plain", LORA, **options, early_stop=False)
    assert same(weights_of(out), weights_of(plain))
    noted = summary_of(out)["early_stop"]
    assert (noted["epoch"], noted["stopped_early"], len(noted["losses"])) == (2, False, 2)
    assert "early_stop" not in summary_of(plain)


def interrupted(pair, corpus, out: Path, method, at: int, **options) -> None:
    """A training that ends before its step `at`, counted from 0."""

    def stopping(self, *args, **kwargs):
        if self.state.global_step == at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    step = CorpusTrainer.training_step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CorpusTrainer, "training_step", stopping)
        trained(pair, corpus, out, method, **options)


@METHODS
def test_interrupted_anywhere_it_ends_with_the_same_bits(tiny_pair, corpus, tmp_path, undisturbed, method):
    expected, _ = undisturbed[method["method"]]
    n_steps = summary_of(expected)["n_steps"]
    for save_steps, places in ((None, range(4, n_steps, 2)), (2, (5, n_steps - 1))):
        for at in places:
            out = tmp_path / f"{save_steps}-{at}"
            interrupted(tiny_pair, corpus, out, method, at, save_steps=save_steps)
            trained(tiny_pair, corpus, out, method, save_steps=save_steps)
            assert same(weights_of(out), weights_of(expected)), at
            assert summary_of(out) == summary_of(expected), at


@METHODS
@pytest.mark.parametrize("when", ["copy", "mark", "remove", "take", "publish"])
def test_ended_at_the_last_checkpoint_it_trains_no_step_more(
    tiny_pair, corpus, tmp_path, undisturbed, monkeypatch, method, when
):
    expected, _ = undisturbed[method["method"]]
    n_steps, out = summary_of(expected)["n_steps"], tmp_path / "out"
    name, module = {
        "copy": ("copytree", "shutil"),
        "mark": ("complete_checkpoint", "trainer"),
        "remove": ("complete_checkpoint", "trainer"),
        "take": ("take_epoch", "place"),
        "publish": ("publish", "place"),
    }[when]
    import spd_lens.training.checkpoint_dir as checkpoint_dir
    import spd_lens.training.trainer as trainer

    owner = {"shutil": shutil, "trainer": trainer, "place": checkpoint_dir.TrainingPlace}[module]
    original = getattr(owner, name)

    def ending(*args, **kwargs):
        reached = (out.with_name("out.training") / "checkpoints" / f"checkpoint-{n_steps}").exists()
        if reached and when == "remove":
            original(*args, **kwargs)
        if reached:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, ending)
        trained(tiny_pair, corpus, out, method)
    steps = []
    step = CorpusTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(
            CorpusTrainer, "training_step", lambda s, *a, **k: steps.append(s.state.global_step) or step(s, *a, **k)
        )
        trained(tiny_pair, corpus, out, method)
    assert steps == (list(range(n_steps - PER_EPOCH, n_steps)) if when in ("copy", "mark") else [])
    assert same(weights_of(out), weights_of(expected))
    assert summary_of(out) == summary_of(expected)


@pytest.mark.parametrize("damage", ["missing", "marker", "one bit", "other epoch"])
def test_an_epochs_weights_that_are_damaged_are_trained_again(tiny_pair, corpus, tmp_path, undisturbed, damage):
    expected, _ = undisturbed["lora"]
    n_steps, out = summary_of(expected)["n_steps"], tmp_path / "out"
    interrupted(tiny_pair, corpus, out, LORA, n_steps - 1)
    kept = out.with_name("out.training") / "epochs"
    last = n_steps // PER_EPOCH - 1
    assert sorted(path.name for path in kept.iterdir()) == [str(last - 1), str(last)]
    place = kept / str(last - 1 if damage == "other epoch" else last)
    if damage in ("missing", "other epoch"):
        shutil.rmtree(place)
    elif damage == "marker":
        (place / "complete").unlink()
    else:
        file = place / "adapter_model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    trained(tiny_pair, corpus, out, LORA)
    assert same(weights_of(out), weights_of(expected))
    assert summary_of(out) == summary_of(expected)


KILLED = """
import os, signal, sys
import torch
import spd_lens.training.checkpoint_dir as checkpoint_dir
from spd_lens.generation.corpus import Corpus
from spd_lens.models import load
from spd_lens.training import finetune

torch.set_num_threads(1)
complete = checkpoint_dir.complete_checkpoint

def dying(place):
    if place.parent.name == "epochs" and place.name == "3":  # its weights are there, and not marked
        os.kill(os.getpid(), signal.SIGKILL)
    complete(place)

checkpoint_dir.complete_checkpoint = dying
directory, corpus, out = sys.argv[1:]
pair = load(directory, dtype="float32", device="cpu")
options = {"epochs": 8, "batch_size": 2, "warmup_epochs": 0.5, "early_stop": True, "progress": False}
finetune(pair, Corpus.load(corpus), out=out, lr=0.1, **options)
"""


def test_killed_while_it_keeps_an_epoch(tiny_llama_dir, tiny_pair, corpus, tmp_path, undisturbed):
    expected, _ = undisturbed["lora"]
    out = tmp_path / "out"
    arguments = [str(tiny_llama_dir), str(corpus.path), str(out)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], env=environment, capture_output=True, text=True, timeout=200
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    left = out.with_name("out.training")
    assert {path.name for path in (left / "epochs").iterdir()} == {"1", "2", "3"}
    trained(tiny_pair, corpus, out, LORA)
    assert same(weights_of(out), weights_of(expected))
    assert summary_of(out) == summary_of(expected)


def test_trainings_with_and_without_are_not_taken_for_each_other(tiny_pair, corpus, tmp_path):
    few = {"lr": 1e-3, "epochs": 1}
    plain = trained(tiny_pair, corpus, tmp_path / "plain", LORA, **few, early_stop=False, warmup_epochs=0.0)
    assert "early_stop" not in summary_of(plain)["settings"]
    assert "max_length" not in summary_of(plain)["settings"]
    with refused("early_stop = false", "early_stop = true", plain):
        trained(tiny_pair, corpus, plain, LORA, **few, warmup_epochs=0.0)
    early = trained(tiny_pair, corpus, tmp_path / "early", LORA, **few)
    with refused("warmup_epochs = 0.5", "warmup_epochs = 0.0"):
        trained(tiny_pair, corpus, early, LORA, **few, warmup_epochs=0)
    interrupted(tiny_pair, corpus, tmp_path / "begun", LORA, 3, lr=1e-3)
    with refused("begun", "max_length = null", "max_length = 9"):
        trained(tiny_pair, corpus, tmp_path / "begun", LORA, lr=1e-3, max_length=9)
    left = tmp_path / "begun.training" / "epochs"
    assert left.exists()
    trained(tiny_pair, corpus, tmp_path / "begun", LORA, **few, resume=False, early_stop=False)
    assert not left.exists()
