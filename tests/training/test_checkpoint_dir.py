"""What lies on disk after a power failure: the adapter is that of an undisturbed training, or a sentence."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from spd_lens.files import read_json, write_json
from spd_lens.generation.corpus import Corpus
from spd_lens.generation.generate import generate
from spd_lens.training.checkpoint_dir import COMPLETE, LOG, TrainingPlace, complete_checkpoint, is_finished
from spd_lens.training.early_stop import EarlyStop
from spd_lens.training.finetune import finetune
from spd_lens.training.trainer import CorpusTrainer, save_weights
from tests.helpers import make_adapter, refused

OPTIONS = {"lr": 1e-3, "epochs": 1, "batch_size": 2, "save_steps": 1, "progress": False}
FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt")
FILES += ("trainer_state.json", COMPLETE)
DAMAGE = {
    "missing": None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: b"\0" * len(content),
    "one bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
}


def spoil(path: Path, kind: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if kind != "missing":
        path.write_bytes(DAMAGE[kind](content))


@pytest.fixture(scope="module")
def corpus(tiny_pair, tiny_prompts) -> Corpus:
    return generate(tiny_pair, tiny_prompts, max_new_tokens=6, progress=False)


@pytest.fixture(scope="module")
def undisturbed(tiny_pair, corpus, tmp_path_factory) -> Path:
    return finetune(tiny_pair, corpus, out=tmp_path_factory.mktemp("undisturbed") / "adapter", **OPTIONS)


@pytest.fixture(scope="module")
def interrupted(tiny_pair, corpus, tmp_path_factory) -> Path:
    """A training of three steps that was stopped after its second checkpoint."""
    out = tmp_path_factory.mktemp("interrupted") / "adapter"

    def stopping(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    step = CorpusTrainer.training_step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CorpusTrainer, "training_step", stopping)
        finetune(tiny_pair, corpus, out=out, **OPTIONS)
    return out


@pytest.fixture
def out(interrupted, tmp_path) -> Path:
    shutil.copytree(interrupted.with_name("adapter.training"), tmp_path / "adapter.training")
    return tmp_path / "adapter"


def checkpoint(out: Path, step: int) -> Path:
    return out.with_name("adapter.training") / "checkpoints" / f"checkpoint-{step}"


def steps_done(pair, corpus, out) -> list[int]:
    """Finish the training; the steps that it still had to do."""
    found = []
    step = CorpusTrainer.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            CorpusTrainer, "training_step", lambda s, *a, **k: found.append(s.state.global_step) or step(s, *a, **k)
        )
        assert finetune(pair, corpus, out=out, **OPTIONS) == out
    return found


def assert_same_adapter(out: Path, undisturbed: Path) -> None:
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (undisturbed / name).read_bytes()
    assert not out.with_name("adapter.training").exists()


def test_a_checkpoint_that_is_whole_is_used(tiny_pair, corpus, out, undisturbed):
    assert set(os.listdir(checkpoint(out, 2))) == set(FILES)
    assert steps_done(tiny_pair, corpus, out) == [2]
    assert_same_adapter(out, undisturbed)


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_none(out, name, kind):
    spoil(checkpoint(out, 2) / name, kind)
    # an empty marker is what earlier versions wrote
    left = 2 if (name, kind) == (COMPLETE, "empty") else 1
    assert TrainingPlace(out).latest_checkpoint() == str(checkpoint(out, left))
    assert checkpoint(out, 2).exists() == (left == 2)
    if left == 1:
        spoil(checkpoint(out, 1) / name, kind)
        again = TrainingPlace(out).latest_checkpoint()
        assert again == (None if (name, kind) != (COMPLETE, "empty") else str(checkpoint(out, 1)))


@pytest.mark.parametrize("content", ["[]", "null", '{"../../x": 3}', '{"optimizer.pt": {"size": "1"}}', "[" * 100_000])
def test_a_hostile_marker_marks_nothing(out, content):
    (checkpoint(out, 2) / COMPLETE).write_text(content)
    assert TrainingPlace(out).latest_checkpoint() == str(checkpoint(out, 1))


def forge(place: Path) -> None:
    """Mark a checkpoint as whole with the files that it has now."""
    (place / COMPLETE).unlink()
    complete_checkpoint(place)


@pytest.mark.parametrize("name", ["checkpoint-²", "checkpoint-x", "checkpoint-"])
def test_a_name_that_is_no_number_is_no_checkpoint(out, name):
    shutil.copytree(checkpoint(out, 2), checkpoint(out, 2).with_name(name))
    assert TrainingPlace(out).latest_checkpoint() == str(checkpoint(out, 2))


def test_a_link_in_place_of_a_checkpoint_goes_and_its_target_stays(out, tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("mine")
    checkpoint(out, 99).symlink_to(tmp_path / "victim")
    checkpoint(out, 98).write_text("no directory")
    assert TrainingPlace(out).latest_checkpoint() == str(checkpoint(out, 2))
    assert not checkpoint(out, 99).is_symlink() and not checkpoint(out, 98).exists()
    assert (tmp_path / "victim" / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "state",
    [
        {"log_history": 5}, {"log_history": [{"loss": "x", "step": 1}]}, {"log_history": [{"loss": 1.0}]},
        {"global_step": "x"}, {"global_step": 10**9}, {"global_step": -1},
    ],
    ids=str,
)  # fmt: skip
def test_the_log_of_a_forged_checkpoint_is_none(out, state):
    file = checkpoint(out, 2) / "trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **state}))
    forge(checkpoint(out, 2))
    stop = EarlyStop(TrainingPlace(out), steps_per_epoch=1)
    shutil.rmtree(checkpoint(out, 1))
    assert TrainingPlace(out).latest_checkpoint(stop.best_epoch) is None


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_pickle_in_a_forged_checkpoint_is_not_executed(tiny_pair, corpus, out, name, tmp_path):
    torch.save({"x": Evil(str(tmp_path / "canary"))}, checkpoint(out, 2) / name)
    forge(checkpoint(out, 2))
    with refused("checkpoint-2 holds something else than numbers", "goes on from before it"):
        finetune(tiny_pair, corpus, out=out, **OPTIONS)
    assert not (tmp_path / "canary").exists()


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("kind", [None, *DAMAGE])
@pytest.mark.parametrize("name", FILES[:-1])
def test_checkpoints_of_earlier_versions_are_used_where_they_are_seen_to_be_whole(out, name, kind):
    (checkpoint(out, 2) / COMPLETE).write_bytes(b"")
    if kind is not None:
        spoil(checkpoint(out, 2) / name, kind)
    # the last bit of an archive is not of its content, and weights have no digest of their own
    seen = kind is not None and (kind, name.rpartition(".")[2]) not in [
        ("one bit", e) for e in ("pt", "pth", "safetensors")
    ]
    assert TrainingPlace(out).latest_checkpoint() == str(checkpoint(out, 1 if seen else 2))


@pytest.mark.parametrize(
    ("spoiled", "left"),
    [
        ({"checkpoints/checkpoint-2/optimizer.pt": "missing"}, [1, 2]),
        ({"checkpoints/checkpoint-2/complete": "empty"}, [2]),
        (
            {"checkpoints/checkpoint-2/scheduler.pt": "zeros", "checkpoints/checkpoint-1/rng_state.pth": "half"},
            [0, 1, 2],
        ),
        ({"settings.json": "empty"}, [0, 1, 2]),
    ],
)
def test_the_training_goes_on_from_what_is_whole(tiny_pair, corpus, out, undisturbed, spoiled, left):
    for name, kind in spoiled.items():
        spoil(out.with_name("adapter.training") / name, kind)
    assert steps_done(tiny_pair, corpus, out) == left
    assert_same_adapter(out, undisturbed)


@pytest.mark.parametrize("content", [None, "", "\0" * 200, "{", "[]", "{}"])
def test_checkpoints_of_unknown_settings_are_none(out, content):
    noted = out.with_name("adapter.training") / "settings.json"
    noted.unlink() if content is None else noted.write_text(content)
    place = TrainingPlace(out)
    with place.working({"lr": 3}, resume=True):
        assert place.latest_checkpoint() is None
    assert read_json(noted) == {"lr": 3}


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("adapter_model.safetensors", kind) for kind in DAMAGE),
        *(("adapter_config.json", kind) for kind in ("missing", "empty", "half", "zeros")),
    ],
)
def test_a_finished_adapter_that_is_damaged_is_not_finished(undisturbed, tmp_path, caplog, recorded, name, kind):
    out = tmp_path / "adapter"
    shutil.copytree(undisturbed, out)
    if not recorded:  # as earlier versions left it
        log = read_json(out / LOG)
        del log["files"], log["config"]
        write_json(out / LOG, log)
    assert is_finished(out)
    spoil(out / name, kind)
    if recorded or kind != "one bit":  # nothing says what it was
        assert not is_finished(out)
        assert str(out) in caplog.text and "training it again" in caplog.text


def test_a_damaged_adapter_is_made_again(tiny_pair, corpus, undisturbed, tmp_path):
    out = tmp_path / "adapter"
    shutil.copytree(undisturbed, out)
    spoil(out / "adapter_model.safetensors", "empty")
    assert steps_done(tiny_pair, corpus, out) == [0, 1, 2]
    assert_same_adapter(out, undisturbed)


def test_an_edited_configuration_and_a_file_more_are_no_damage(tiny_pair, corpus, undisturbed, tmp_path):
    out = tmp_path / "adapter"
    shutil.copytree(undisturbed, out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "moved"}))
    (out / "README.md").write_text("mine")
    assert steps_done(tiny_pair, corpus, out) == []
    assert (out / "README.md").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": null}', "[" * 100_000])
def test_an_adapter_of_unknown_settings_is_refused_by_name(tiny_pair, corpus, undisturbed, tmp_path, content):
    out = tmp_path / "adapter"
    shutil.copytree(undisturbed, out)
    (out / LOG).write_text(content)
    with refused(out / LOG, "remove its directory and train again"):
        finetune(tiny_pair, corpus, out=out, **OPTIONS)
    assert (out / "adapter_model.safetensors").exists()


def test_a_place_where_nothing_was_made_is_taken(tiny_pair, corpus, undisturbed, tmp_path):
    (tmp_path / "adapter").mkdir()
    for name in (".DS_Store", ".lock", ".training.json.123", ".x.123-0a1b2c3d.tmp"):
        (tmp_path / "adapter" / name).touch()
    steps_done(tiny_pair, corpus, tmp_path / "adapter")
    assert_same_adapter(tmp_path / "adapter", undisturbed)


@pytest.mark.parametrize("link", ["adapter.training", "adapter.training/checkpoints", "adapter.training/result"])
def test_nothing_is_deleted_through_a_link(tiny_pair, corpus, tmp_path, link):
    victim = tmp_path / "victim"
    for name in ("result", "checkpoints", "checkpoints/checkpoint-1"):
        (victim / name).mkdir(parents=True)
        (victim / name / "precious").touch()
    before = sorted(victim.rglob("*"))
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to(victim)
    with refused(tmp_path / link, "is a link"):
        finetune(tiny_pair, corpus, out=tmp_path / "adapter", **OPTIONS)
    assert sorted(victim.rglob("*")) == before


def test_what_a_process_killed_at_the_very_end_leaves_goes(tiny_pair, corpus, undisturbed, out):
    shutil.copytree(undisturbed, out)
    assert steps_done(tiny_pair, corpus, out) == []
    assert_same_adapter(out, undisturbed)


def test_the_configuration_of_an_adapter_is_the_same_file_each_time(tiny_pair, tmp_path):
    names = ["v_proj", "up_proj", "q_proj", "o_proj", "k_proj", "gate_proj", "down_proj"]
    made = make_adapter(tiny_pair.hf, tmp_path / "a", targets=names)
    model = PeftModel.from_pretrained(copy.deepcopy(tiny_pair.hf), made)
    save_weights(model, tmp_path / "b")
    saved = (tmp_path / "b" / "adapter_config.json").read_text()
    record = json.loads(saved)
    assert record["target_modules"] == sorted(names)
    assert saved == json.dumps(record, indent=2, sort_keys=True)  # PEFT's own form
    theirs = json.loads((made / "adapter_config.json").read_text())
    assert {**record, "target_modules": 0} == {**theirs, "target_modules": 0}
    assert (
        load_file(tmp_path / "b" / "adapter_model.safetensors").keys()
        == load_file(made / "adapter_model.safetensors").keys()
    )
