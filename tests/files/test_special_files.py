"""What stands in place of a file: pipes and devices, which never end, and links that lead somewhere else."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from spd_lens.files import read_json, refuse_linked, refuse_stand_in
from spd_lens.files.limits import check_header
from spd_lens.files.manifest import forget, record_files
from spd_lens.generation.corpus import Corpus
from spd_lens.models.load import load
from spd_lens.runs.plain_yaml import read_text
from spd_lens.runs.run_dir import Run
from spd_lens.runs.verification import verify
from tests.helpers import refused

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


@pytest.fixture(autouse=True)
def _in_time():
    """Whoever opens a pipe that nobody writes to waits for ever."""

    def late(*_):
        raise AssertionError("it waits for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("read", [read_json, refuse_stand_in, check_header, read_text, Corpus.load])
def test_a_pipe_is_no_file(read, tmp_path):
    path = tmp_path / "x.json"
    os.mkfifo(path)
    with refused("x.json", "does not exist" if read == Corpus.load else "a pipe, a device or a socket"):
        read(path)


def test_a_device_is_no_file(tmp_path):
    (tmp_path / "x.json").symlink_to("/dev/zero")
    with refused("x.json", "a pipe, a device or a socket"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"])
def test_a_model_with_a_pipe_in_it(name, tiny_llama_dir, tmp_path):
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with refused(name, "a pipe, a device or a socket"):
        load(directory, dtype="float32", device="cpu")


def test_verify_names_a_pipe(finished_run, tmp_path):
    path = shutil.copytree(finished_run.path, tmp_path / "run")
    os.mkfifo(path / "notes.txt")
    found = verify(path)
    assert len(found.damaged) == 1 and "notes.txt is no file but a pipe" in found.damaged[0]


def test_a_run_writes_into_no_linked_directory(finished_run, tmp_path):
    path = shutil.copytree(finished_run.path, tmp_path / "run")
    victim = tmp_path / "victim"
    shutil.move(path / "effects", victim)
    (path / "effects").symlink_to(victim)
    before = {file: file.read_bytes() for file in victim.rglob("*") if file.is_file()}
    with refused("effects is a link"), Run(path).locked():
        pass
    assert {file: file.read_bytes() for file in victim.rglob("*") if file.is_file()} == before
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(finished_run.path)
    refuse_linked(elsewhere)  # a run that is itself behind a link is its owner's choice


def test_a_lock_that_is_a_link(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".manifest.lock").symlink_to(tmp_path / "victim")
    (tmp_path / "a.json").write_text("{}")
    with refused(".manifest.lock cannot be locked"):
        record_files(tmp_path, [tmp_path / "a.json"], lambda _: "extract")
    (tmp_path / ".manifest.lock").unlink()
    record_files(tmp_path, [tmp_path / "a.json"], lambda _: "extract")
    (tmp_path / ".manifest.lock").unlink()
    (tmp_path / ".manifest.lock").symlink_to(tmp_path / "victim")
    with refused(".manifest.lock cannot be locked"):
        forget(tmp_path / "a.json")
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_model_does_not_change_with_its_file(tiny_llama_dir, tmp_path):
    directory = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    pair = load(directory, dtype="float32", device="cpu")
    before = {name: weight.clone() for name, weight in pair.hf.state_dict().items()}
    file = directory / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:  # in place, as cp does it
        stream.seek(size // 2)
        stream.write(b"\x01" * (size - size // 2))
        stream.truncate(size // 2)
    assert all(weight.equal(before[name]) for name, weight in pair.hf.state_dict().items())
