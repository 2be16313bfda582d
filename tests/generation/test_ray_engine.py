"""A corpus by workers of a local Ray cluster is the twin's, whoever dies; what differs between workers is named."""

from __future__ import annotations

import os
from dataclasses import replace

import psutil
import pytest
import torch

from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.generation.corpus import Corpus, CorpusWriter
from spd_lens.generation.engines.ray import RayEngine, Recipe, Worker
from spd_lens.generation.generate import generate
from spd_lens.generation.jobs import Decoding, Job
from spd_lens.settings import EngineSettings, SamplingSettings
from spd_lens.subspaces.policy import Policy
from spd_lens.subspaces.subspace import Subspace
from tests.helpers import make_adapter, refused

os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # on a busy machine; Ray reads it when it is imported
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'spd-lens[cluster]'")

OPTIONS = {"max_new_tokens": 12, "temperature": 1.2, "top_p": 0.9, "samples_per_prompt": 2, "progress": False}


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two CPUs on this machine, which the engine finds open."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # it would kill ours for the memory of others
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
        yield
        ray.shutdown()


def workers() -> list[psutil.Process]:
    """This process's own Ray workers with a model."""
    mine = psutil.Process().children(recursive=True)
    return [process for process in mine if process.name().startswith("ray::Worker")]


@pytest.fixture
def kill_next(monkeypatch):
    """Called, it has a worker killed once the next completions are in the corpus; returns all that were killed."""
    append, killed, asked = CorpusWriter.append, [], []

    def append_and_kill(self, records):
        append(self, records)
        if asked:
            asked.pop()
            victim = workers()[0]
            victim.kill()
            killed.append(victim.pid)

    monkeypatch.setattr(CorpusWriter, "append", append_and_kill)

    def _kill_next():
        asked.append(True)
        return killed

    return _kill_next


def half(pair) -> Subspace:
    template = torch.eye(8, dtype=torch.float64)[:, :4].expand(2, -1, -1).clone()
    sites = pair.sites("last_mid")
    return Subspace(dict.fromkeys(sites, template), dict.fromkeys(sites, (4, 4))).random_like(0)


def by_ray(pair, prompts, path, **settings) -> Corpus:
    engine = EngineSettings(generation_engine="ray", **settings)
    return generate(pair, prompts, engine_settings=engine, path=path, subspace=half(pair), **OPTIONS)


@pytest.mark.timeout(600)  # five processes start, and read a model each
def test_whichever_worker_dies_the_corpus_is_the_twins(cluster, tiny_pair, tiny_prompts, tmp_path, kill_next):
    """One is lost for good, and what it wrote is kept; of two that go on from there one is killed, and replaced."""
    path = tmp_path / "corpus.jsonl"
    twin = generate(tiny_pair, tiny_prompts, subspace=half(tiny_pair), **OPTIONS)
    kill_next()
    with refused("lost for good after 0 restarts", "run the same again"):
        by_ray(tiny_pair, tiny_prompts, path, engine_workers=1, engine_retries=0)
    kept = path.read_text()
    assert 0 < len(kept.splitlines()) < 12
    killed = kill_next()
    made = by_ray(tiny_pair, tiny_prompts, path, engine_workers=2)
    assert len(killed) == 2
    assert made.records == twin.records
    assert Corpus.load(path).records == twin.records
    assert path.read_text().startswith(kept)
    assert made.settings == {**twin.settings, "engine": "ray"}


def test_what_a_worker_refuses_is_one_sentence_here(cluster, fresh_pair, tiny_prompts, tmp_path):
    with torch.no_grad():
        fresh_pair.hf.lm_head.weight += 1  # no directory holds this model
    with refused("the Ray worker on", "has weights"):
        by_ray(fresh_pair, tiny_prompts, tmp_path / "corpus.jsonl", engine_workers=1)
    assert not (tmp_path / "corpus.jsonl").exists()


def test_a_cluster_that_is_too_small_is_refused(cluster, tiny_pair, tiny_prompts, tmp_path):
    with refused("2 CPUs", "64 workers"):
        by_ray(tiny_pair, tiny_prompts, tmp_path / "corpus.jsonl", engine_workers=64)


def made_worker(pair, **changes) -> Worker:
    decoding = Decoding.of(pair, SamplingSettings(max_new_tokens=4))
    return Worker(replace(Recipe.of(pair, decoding, Policy(), None), **changes))


@pytest.mark.parametrize("name", ["spd_lens", "code", "torch", "transformers", "fingerprint", "weights", "adapter"])
def test_every_difference_between_workers_is_refused_by_name(tiny_pair, name):
    same = made_worker(tiny_pair).recipe.identity
    with refused(f"has {name} {same[name]}, not other"):
        made_worker(tiny_pair, identity={**same, name: "other"}).pair  # noqa: B018  it is loaded when it is asked for


def test_another_adapter_is_another_identity(tiny_pair, tmp_path):
    adapter = make_adapter(tiny_pair.hf, tmp_path / "adapter")
    with refused("has adapter"):
        made_worker(tiny_pair, policy=Policy(adapter=adapter)).pair  # noqa: B018  as above


def test_a_prompt_of_other_tokens_is_refused_by_its_id(tiny_pair):
    job = Job(Example("7 * 3", id="seven"), 0, [1, 2, 3])
    with refused("reads prompt 'seven' otherwise"):
        made_worker(tiny_pair).complete([job])


def test_settings_of_other_engines_are_refused(tiny_pair):
    with pytest.raises(SPDError, match="engine_python"):
        RayEngine.check(EngineSettings(generation_engine="ray", engine_python="python"))
