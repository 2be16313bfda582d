"""What a run finds in its directory and does not make again: it must be of its model, and of what is beside it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from spd_lens.files import read_json, write_json
from spd_lens.files.manifest import MANIFEST
from spd_lens.models.fingerprint import Fingerprint
from spd_lens.runs.pipeline import run
from spd_lens.runs.preflight import check_kept
from spd_lens.runs.run_dir import Run
from tests.helpers import refused


@pytest.fixture
def strangers(finished_run, tmp_path):
    """A copy of a finished run, of which nothing lists the files."""
    path = shutil.copytree(finished_run.path, tmp_path / "run")
    (path / MANIFEST).unlink()
    return Run.open(path)


def other(fingerprint):
    """The fingerprint of another model of the same shape."""
    return Fingerprint.from_dict({**fingerprint.to_dict(), "sample": list(fingerprint.sample)[::-1]}, "it")


def test_what_is_its_own_is_taken(strangers, tiny_pair):
    check_kept(strangers, tiny_pair)
    run(strangers.config, strangers.path, progress=False, pair=tiny_pair)


@pytest.mark.parametrize("name", ["subspace", "moments"])
def test_directions_of_another_model(name, strangers, tiny_pair):
    found = getattr(strangers, name)
    replace(found, fingerprint=other(found.fingerprint)).save(strangers.path / f"{name}.safetensors")
    with refused(f"{name}.safetensors", "another model of the same shape"):
        run(strangers.config, strangers.path, progress=False, pair=tiny_pair)


@pytest.mark.parametrize(
    ("key", "words"), [("fingerprint", "another model of the same shape"), ("subspace", "under the subspace 0123")]
)
def test_a_corpus_of_something_else(key, words, strangers, tiny_pair):
    path = strangers.path / "corpus.settings.json"
    content = json.loads(path.read_text())
    content.pop("sha256", None)
    values = {"fingerprint": other(tiny_pair.fingerprint).to_dict(), "subspace": "0123"}
    content["settings"][key] = values[key]
    write_json(path, content)
    with refused("corpus", words):
        check_kept(strangers, tiny_pair)


@pytest.mark.parametrize("key", ["corpus", "weights"])
def test_an_adapter_of_something_else(key, strangers, tiny_pair):
    path = strangers.adapter / "training.json"
    content = read_json(path)
    content["settings"][key] = "0123"
    write_json(path, content)
    with refused("adapter", f"with the {key} 0123"):
        check_kept(strangers, tiny_pair)
