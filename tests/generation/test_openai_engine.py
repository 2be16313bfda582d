"""The engine `openai` against real servers on this machine: the same tokens, the right policy, all wrong answers."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import pytest
import torch

from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.generation.corpus import Corpus, CorpusWriter, settings_path
from spd_lens.generation.engines.greedy_probe import TEXTS
from spd_lens.generation.generate import generate
from spd_lens.settings import EngineSettings
from spd_lens.subspaces.projection import fold_to
from spd_lens.subspaces.subspace import Subspace
from tests.completions_server import NEEDS_OPENAI, serving
from tests.helpers import refused, without_sums

pytestmark = NEEDS_OPENAI
N = 12
PROBES = len(TEXTS) + 1
"""Requests before the first prompt, where nothing is sampled: one to see the form, and the texts."""
SAMPLED = {"temperature": 0.9, "top_p": 0.95}


@pytest.fixture(autouse=True)
def _short_probe(monkeypatch):
    """Fewer tokens to compare: models this small differ at once."""
    monkeypatch.setattr("spd_lens.generation.engines.greedy_probe.N_NEW", 5)


@pytest.fixture(scope="module")
def subspace(tiny_pair):
    template = torch.eye(8, dtype=torch.float64)[:, :4].expand(2, -1, -1).clone()
    sites = tiny_pair.sites("last_mid")
    return Subspace(dict.fromkeys(sites, template), dict.fromkeys(sites, (4, 4))).random_like(0)


@pytest.fixture(scope="module")
def folded_dir(tiny_pair, subspace, tmp_path_factory):
    return fold_to(tiny_pair.hf, subspace, tmp_path_factory.mktemp("served") / "folded", tokenizer=tiny_pair.tokenizer)


@pytest.fixture
def made(tiny_pair, tiny_prompts):
    """A corpus of a server, with the engine's settings by their short names."""

    def make(served, path=None, prompts=tiny_prompts, pair=tiny_pair, engine=(), **options):
        names = {"url": served.url, "concurrency": 3, "retries": 0, **dict(engine)}
        settings = EngineSettings(**{f"engine_{name}": value for name, value in names.items()})
        options = {"temperature": 0.0, "max_new_tokens": N, "progress": False, "path": path} | options
        return generate(pair, prompts, engine="openai", engine_settings=settings, **options)

    return make


@pytest.fixture(scope="module")
def healthy(tiny_llama_dir):
    with serving({"tiny": tiny_llama_dir}) as served:
        yield served


@pytest.fixture
def twin(tiny_pair, tiny_prompts):
    return generate(tiny_pair, tiny_prompts, temperature=0.0, max_new_tokens=N, progress=False)


def test_greedy_completions_are_those_of_the_twin(healthy, made, twin, tmp_path):
    corpus = made(healthy, tmp_path / "c.jsonl")
    assert corpus.records == twin.records == Corpus.load(tmp_path / "c.jsonl").records
    about = {name: value for name, value in corpus.settings.items() if name.startswith("engine")}
    assert about == {
        "engine": "openai", "engine_model": "tiny", "engine_server": "tests 1.2",
        "engine_request": {
            "temperature": 0.0, "top_p": 1.0, "max_tokens": N, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
            "stop_token_ids": [1], "return_token_ids": True,
        },
        "engine_tokens": {"prompt": "ids", "completion": "ids"},
    }  # fmt: skip
    same = {name: value for name, value in corpus.settings.items() if not name.startswith("engine")}
    assert same == {name: value for name, value in twin.settings.items() if name != "engine"}
    assert healthy.url not in json.dumps(corpus.settings)


def test_a_completion_ends_with_any_of_the_stop_tokens(
    tiny_qwen2_pair, tiny_qwen2_dir, made, tiny_prompts, monkeypatch
):
    pair = tiny_qwen2_pair  # whose chat template ends a turn with a token of its own
    plain = generate(pair, tiny_prompts, temperature=0.0, max_new_tokens=N, progress=False)
    monkeypatch.setattr(pair.hf.generation_config, "eos_token_id", plain[0].completion_ids[4])
    twin = generate(pair, tiny_prompts, temperature=0.0, max_new_tokens=N, progress=False)
    assert twin[0].finish_reason == "eos" and len(twin[0].completion_ids) <= 5
    for shows_ids in (True, False):
        with serving({"chat": tiny_qwen2_dir}, shows_ids=shows_ids) as served:
            corpus = made(served, pair=pair)
        assert [(r.completion, r.finish_reason) for r in corpus] == [(r.completion, r.finish_reason) for r in twin]
        assert shows_ids is (corpus.records == twin.records)


@pytest.mark.parametrize("behaviour", [{"shows_ids": False}, {"takes_ids": False, "strict": True}])
def test_text_stands_in_for_ids_that_a_server_does_not_take_or_show(tiny_llama_dir, made, twin, behaviour):
    with serving({"tiny": tiny_llama_dir}, **behaviour) as served:
        corpus = made(served)
        sampled = made(served, **SAMPLED, top_k=5)
    kinds = {"prompt": "ids" if "takes_ids" not in behaviour else "text", "completion": "text"}
    assert corpus.settings["engine_tokens"] == kinds
    assert [r.completion for r in corpus] == [r.completion for r in twin]
    assert [r.prompt_ids for r in corpus] == [r.prompt_ids for r in twin]
    assert len({r.completion_ids for r in sampled}) == len(sampled)


def test_transformers_serve_gives_the_same_completions(tiny_llama_dir, made, twin, tmp_path):
    """Another's server, with its own model and tokenizer in a process of its own."""
    pytest.importorskip("fastapi", reason="`transformers serve` needs fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import app; app()", "serve", tiny_llama_dir]
    options = ["--port", str(port), "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    with (tmp_path / "log").open("w") as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen([*map(str, command), *options], stdout=log, stderr=log, env=environment)
    try:
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.5)
        served = SimpleNamespace(url=f"http://127.0.0.1:{port}/v1")
        engine = {"model": str(tiny_llama_dir), "concurrency": 1}
        corpus = made(served, engine=engine)
        sampled = made(served, engine=engine, prompts=["a", "b"], **SAMPLED, top_k=7)
        with refused("400", "Server is pinned to"):
            made(served, engine={"model": "other"})
    finally:
        server.terminate()
        server.wait()
    assert [(r.completion, r.finish_reason) for r in corpus] == [(r.completion, r.finish_reason) for r in twin]
    assert corpus.settings["engine_tokens"] == {"prompt": "text", "completion": "text"}
    assert corpus.settings["engine_server"] == "uvicorn"
    assert json.loads(sampled.settings["engine_request"]["generation_config"])["top_k"] == 7


def _answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_the_served_projection_is_told_from_the_plain_model_and_from_another(
    tiny_pair, tiny_llama_dir, folded_dir, subspace, made, tiny_prompts
):
    twin = generate(tiny_pair, tiny_prompts, temperature=0.0, max_new_tokens=N, subspace=subspace, progress=False)
    with serving({"base": tiny_llama_dir, "math": folded_dir}) as served:
        assert made(served, engine={"model": "math"}, subspace=subspace).records == twin.records
        with refused("base, math", "engine_model"):
            made(served, subspace=subspace)
        with refused("'base'", "'projected'", repr(TEXTS[0]), "--as lora", "without the policy", "SUBSPACE"):
            made(served, engine={"model": "base"}, subspace=subspace)
        with refused("'math'", "not the model of", "as it is"):
            made(served, engine={"model": "math"})
        with refused("'math'", "'projected'", "token"):
            made(served, engine={"model": "math"}, subspace=subspace.random_like(5))
        with refused("404", "no model code", "engine_model"):
            made(served, engine={"model": "code"}, subspace=subspace)
        assert len(served.requests) < 40  # nobody asked for a completion of a prompt but the first


def test_a_probe_that_cannot_tell_says_so(healthy, tiny_pair, made, caplog):
    sites = tiny_pair.sites("last_mid")
    everything = torch.eye(8, dtype=torch.float64).expand(2, -1, -1).clone()
    whole = Subspace(dict.fromkeys(sites, everything), dict.fromkeys(sites, (8, 8)))
    with caplog.at_level(logging.WARNING):
        made(healthy, subspace=whole)
    assert "cannot tell the policy from the model without it" in caplog.text


def test_sampling_is_the_servers_own_and_repeats_by_seed(healthy, made, twin):
    first, again, other = (made(healthy, **SAMPLED, seed=seed) for seed in (1, 1, 2))
    assert first.records == again.records
    assert sum(a.completion_ids != b.completion_ids for a, b in zip(first, other, strict=True)) >= 5
    assert first.records != twin.records
    seeds = [asked["seed"] for asked in healthy.requests[-len(twin) :]]
    assert len(set(seeds)) == len(twin) and max(seeds) < 2**31


@pytest.mark.parametrize(("behaviour", "word"), [({"samples": False}, "greedy"), ({"heeds_top_k": False}, "top_k")])
def test_a_server_that_does_not_sample_as_it_is_asked_is_refused(tiny_llama_dir, made, behaviour, word):
    with serving({"tiny": tiny_llama_dir}, **behaviour) as served:
        with refused("'tiny'", word):
            made(served, **SAMPLED, top_k=5)
        made(served)  # greedy needs neither


FAULTS = {
    "429": "HTTP 429", "500": "HTTP 500", "half": "no completion", "closed": "no answer", "slow": "engine_timeout",
    "no choice": "0 completions", "two choices": "2 completions", "foreign token": "1000000",
    "other prompt": "another prompt", "cut": "cut at 2 tokens, not 12", "abort": "'abort'",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_answer_is_one_sentence_and_loses_nothing(tiny_llama_dir, made, twin, tmp_path, fault):
    path = tmp_path / "c.jsonl"
    with serving({"tiny": tiny_llama_dir}) as served:
        served.fault = lambda n: fault if n == PROBES + 3 else None
        timeout = {"timeout": 1.5} if fault == "slow" else {}
        with refused(served.url, FAULTS[fault], "the same again continues"):
            made(served, path, engine={"concurrency": 1, **timeout})
        assert len(Corpus.load(path)) == 3  # those before it
        served.fault = lambda n: None
        before = len(served.requests)
        assert made(served, path).records == twin.records
        assert len(served.requests) - before == PROBES + 3  # nothing twice
    lines = path.read_text().splitlines()
    assert len(lines) == len({json.loads(line)["id"] for line in lines}) == len(twin)


def test_what_was_in_flight_beside_a_failure_is_kept(tiny_llama_dir, made, tmp_path):
    path = tmp_path / "c.jsonl"
    at_once = {"fault": lambda n: "500" if n == PROBES else None, "delay": 0.3}  # while the others take their time
    with serving({"tiny": tiny_llama_dir}, **at_once) as server, refused("HTTP 500"):
        made(server, path, engine={"concurrency": 4})
    assert len(Corpus.load(path)) == 3


def test_passing_faults_are_tried_again_and_few_requests_are_in_flight(tiny_llama_dir, made, twin):
    faults = {2: "429", PROBES + 2: "500", PROBES + 4: "429", PROBES + 6: "closed"}
    with serving({"tiny": tiny_llama_dir}, fault=faults.get, delay=0.02) as served:
        assert made(served, engine={"retries": 4, "concurrency": 2}).records == twin.records
        assert len(served.requests) == PROBES + len(twin) + len(faults)
        assert served.most_at_once == 2


def test_a_run_that_was_interrupted_ends_with_the_file_of_an_undisturbed_one(healthy, made, tmp_path, monkeypatch):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "c.jsonl"
    made(healthy, whole, **SAMPLED, samples_per_prompt=2)
    append, left = CorpusWriter.append, iter(range(3))

    def until_interrupted(writer, records):
        if next(left, None) is None:
            raise KeyboardInterrupt
        append(writer, records)

    with monkeypatch.context() as patch:
        patch.setattr(CorpusWriter, "append", until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(healthy, path, **SAMPLED, samples_per_prompt=2)
    assert 0 < len(Corpus.load(path)) < 12
    made(healthy, path, **SAMPLED, samples_per_prompt=2)
    assert without_sums(path) == without_sums(whole)
    assert settings_path(path).read_text() == settings_path(whole).read_text()


def test_another_server_does_not_continue_a_corpus(healthy, tiny_llama_dir, made, tiny_prompts, tmp_path):
    path = tmp_path / "c.jsonl"
    made(healthy, path, prompts=tiny_prompts[:2])
    with serving({"other name": tiny_llama_dir}) as served, refused("engine_model", '"tiny"', '"other name"'):
        made(served, path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine_url": "localhost:8000"}, ["engine_url", "'localhost:8000'"]),
        ({"engine_url": "http://me:secret@there/v1"}, ["password", "OPENAI_API_KEY"]),
        ({}, ["engine_url", "http://"]),
        ({"engine_url": "http://127.0.0.1:9/v1"}, ["127.0.0.1:9", "no answer"]),
    ],
)
def test_a_wrong_address_is_one_sentence(tiny_pair, tmp_path, settings, words):
    path = tmp_path / "c.jsonl"
    with pytest.raises(SPDError) as caught:
        own = {"engine_settings": EngineSettings(**settings), "max_new_tokens": N, "path": path}
        generate(tiny_pair, ["a"], engine="openai", **own)
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    assert "secret" not in message and "\n" not in message
    assert not path.exists()


def test_an_address_without_completions(healthy, made):
    elsewhere = {"url": healthy.url.removesuffix("/v1")}
    with refused("lists no model", "engine_url"):
        made(healthy, engine=elsewhere)
    with refused("404", "engine_url"):
        made(healthy, engine={**elsewhere, "model": "tiny"})


def test_what_the_engines_do_not_go_with(healthy, made, tiny_pair, subspace, monkeypatch):
    with refused("'twin'", "engine_url"):
        generate(tiny_pair, ["a"], engine_settings=EngineSettings(engine_url=healthy.url))
    with refused("EngineSettings", "dict"):
        generate(tiny_pair, ["a"], engine_settings={"engine_url": healthy.url})
    with refused("2 subspaces", "one served model"):
        made(healthy, prompts=[Example("a", id="a"), Example("b", id="b")], subspace={"a": None, "b": subspace})
    with monkeypatch.context() as patch:
        patch.setattr(tiny_pair.hf.generation_config, "no_repeat_ngram_size", 3)
        with refused("no_repeat_ngram_size", "'openai'", "'twin'"):
            made(healthy)
    monkeypatch.setitem(sys.modules, "openai", None)
    with refused("openai", "spd-lens[servers]"):
        made(healthy)
