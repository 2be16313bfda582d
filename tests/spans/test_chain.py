"""From a model to the tokens that shaped it: a run's chain holds, and each artefact that was exchanged breaks it."""

import json
import shutil

import pytest

from spd_lens.files import write_text
from spd_lens.generation.corpus import settings_path
from spd_lens.runs.run_dir import Run
from spd_lens.spans.chain import explain, scored_tokens
from tests.helpers import refused


def states(chain):
    return {link.what: link.holds for link in chain.links}


@pytest.fixture
def copy(finished_run, tmp_path):
    return Run.open(shutil.copytree(finished_run.path, tmp_path / "run"))


def test_a_run_leads_from_the_adapter_to_the_tokens(finished_run, tmp_path):
    chain = explain(finished_run.path)
    assert states(chain) == dict.fromkeys(("adapter", "corpus", "subspace", "data", "examples", "tokens"), True)
    assert states(explain(finished_run.path / "adapter")) == states(chain)
    assert list(states(explain(finished_run.subspace_path))) == ["subspace", "data", "examples", "tokens"]
    tokens = list(scored_tokens(chain))
    assert len(tokens) == finished_run.subspace.origin["n_scored"]
    assert sum(token["weight"] for token in tokens) == pytest.approx(1)
    # the tokens that count are those of the answers
    for item in chain.tokens.examples:
        scored = "".join(piece.text for piece in item.pieces if piece.scored)
        start, end = item.example.spans[0]
        assert item.example.completion[start:end] in scored


def exchanged_corpus(run):
    lines = run.corpus_path.read_text().splitlines()
    record = json.loads(lines[0])
    record["completion_ids"][0] += 1
    run.corpus_path.write_text("\n".join([json.dumps(record), *lines[1:]]) + "\n")


def exchanged_subspace(run):
    run.subspace.random_like(1).save(run.subspace_path)


def exchanged_weights(run):
    file = run.adapter / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def exchanged_data(run):
    run.note(data=dict.fromkeys(run.notes["data"], "0" * 64))


def other_examples(run):
    text = run.config_path.read_text()
    write_text(run.config_path, text.replace("data_seed: 42", "data_seed: 43"))


def cut_moments(run):
    run.moments_path.write_bytes(run.moments_path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "broken"),
    [
        (exchanged_corpus, {"adapter", "corpus"}), (exchanged_subspace, {"corpus", "subspace"}),
        (exchanged_weights, {"adapter"}), (exchanged_data, {"data"}), (other_examples, {"examples"}),
        (cut_moments, {"moments"}),
    ],
)  # fmt: skip
def test_what_was_exchanged_is_named(copy, damage, broken):
    damage(copy)
    chain = explain(copy.path)
    assert {what for what, holds in states(chain).items() if holds is False} & broken
    assert not chain.holds


def test_what_is_not_there_is_not_checked_and_not_broken(copy, tmp_path):
    alone = shutil.copy(copy.subspace_path, tmp_path / "alone.safetensors")
    chain = explain(alone)
    assert states(chain) == {"subspace": None, "examples": None} and chain.holds and chain.tokens is None
    assert copy.config.task in chain.links[-1].says
    copy.corpus_path.unlink()
    settings_path(copy.corpus_path).unlink()
    assert states(explain(copy.path))["adapter"] is None


def test_a_projection_as_an_adapter_leads_to_its_subspace(finished_run, tiny_pair, tmp_path):
    adapter = finished_run.subspace.to_lora(tiny_pair.hf, tmp_path / "lora")
    assert states(explain(adapter)) == {"adapter": None, "subspace": None}
    finished_run.subspace.save(tmp_path / "s.safetensors")
    assert states(explain(adapter)) == {"adapter": True, "subspace": None, "examples": None}


def test_what_is_neither_is_refused(tmp_path, tiny_llama_dir):
    for place in (tiny_llama_dir, tmp_path / "nothing"):
        with refused(place, "no run directory"):
            explain(place)
    (tmp_path / "x.safetensors").write_bytes(b"x")
    with refused("x.safetensors"):
        explain(tmp_path / "x.safetensors")
