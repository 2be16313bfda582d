"""The engine `vllm`: its process, its checkpoint and its refusals on a stand-in for vLLM; its tokens on a real one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from spd_lens.generation.corpus import Corpus
from spd_lens.generation.generate import generate
from spd_lens.models.load import load
from spd_lens.models.pair import ModelPair
from spd_lens.settings import DEFAULT_MODEL, EngineSettings
from spd_lens.subspaces.subspace import Subspace
from tests.helpers import make_adapter, refused

GREEDY = {"max_new_tokens": 12, "temperature": 0.0, "progress": False}
STAND_IN = Path(__file__).with_name("stand_in")


@pytest.fixture
def stand_in(monkeypatch):
    """The tests' own Python has vLLM, as far as the process that is started can tell."""
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))


def by_vllm(pair, prompts, python: str = sys.executable, **options) -> Corpus:
    settings = EngineSettings(generation_engine="vllm", engine_python=python)
    return generate(pair, prompts, engine_settings=settings, **(GREEDY | options))


def half(pair: ModelPair) -> Subspace:
    sites, shape = pair.sites("last_mid"), pair.fingerprint
    template = torch.eye(shape.d_head, dtype=torch.float64)[:, : shape.d_head // 2]
    bases = dict.fromkeys(sites, template.expand(shape.n_kv_heads, -1, -1).clone())
    return Subspace(bases, dict.fromkeys(sites, (shape.d_head // 2,) * shape.n_kv_heads)).random_like(0)


def test_prompts_go_out_as_tokens_under_subspace_and_adapter_and_come_back_as_the_twins(
    stand_in, tiny_pair, tiny_prompts, tmp_path
):
    policy = {"subspace": half(tiny_pair), "adapter": make_adapter(tiny_pair.hf, tmp_path / "adapter")}
    made = by_vllm(tiny_pair, tiny_prompts, path=tmp_path / "corpus.jsonl", **policy)
    assert made.records == generate(tiny_pair, tiny_prompts, **GREEDY, **policy).records
    assert made.records != generate(tiny_pair, tiny_prompts, **GREEDY, subspace=policy["subspace"]).records
    assert made.settings["engine_server"] == "vLLM 0.0-stand-in"
    assert made.settings["engine_request"]["stop_token_ids"] == made.settings["stop_ids"]


def test_a_process_that_dies_keeps_what_it_answered_and_the_rest_follows(
    stand_in, tiny_pair, tiny_prompts, tmp_path, monkeypatch
):
    path = tmp_path / "corpus.jsonl"
    monkeypatch.setenv("STAND_IN_DIES_WITH", "2")
    with refused("2 of 6 prompts unanswered", "illegal memory access", "run the same again"):
        by_vllm(tiny_pair, tiny_prompts, path=path)
    assert len(Corpus.load(path)) == 4
    monkeypatch.delenv("STAND_IN_DIES_WITH")
    assert by_vllm(tiny_pair, tiny_prompts, path=path).records == generate(tiny_pair, tiny_prompts, **GREEDY).records


@pytest.mark.parametrize(
    ("python", "says"), [(sys.executable, "No module named 'vllm'"), ("/nowhere/python", "No such file")]
)
def test_a_python_without_vllm_is_refused_before_a_file_is_begun(tiny_pair, tmp_path, python, says):
    with refused(python, says, "engine_python"):
        by_vllm(tiny_pair, ["7 * 3"], python, path=tmp_path / "corpus.jsonl")
    assert not list(tmp_path.iterdir())


def test_what_vllm_does_not_apply_is_refused_by_name(fresh_pair):
    fresh_pair.hf.generation_config.no_repeat_ngram_size = 2
    with refused("no_repeat_ngram_size", "'twin'"):
        by_vllm(fresh_pair, ["7 * 3"])


@pytest.mark.smollm2
def test_a_real_vllm_writes_the_twins_tokens():
    python = os.environ.get("SPD_LENS_VLLM_PYTHON")
    if python is None:
        pytest.skip("SPD_LENS_VLLM_PYTHON names no Python that has vLLM")
    pair = load(DEFAULT_MODEL, dtype="float32")
    prompts = ["What is 17 plus 25?", "Name three fruits.", "Write a haiku about rain.", "Is 91 a prime number?"]
    options = {**GREEDY, "max_new_tokens": 24, "subspace": half(pair)}
    same = [
        mine.completion_ids == theirs.completion_ids
        for mine, theirs in zip(
            by_vllm(pair, prompts, python, **options), generate(pair, prompts, **options), strict=True
        )
    ]
    assert sum(same) >= len(prompts) - 1  # a tie may be broken otherwise
