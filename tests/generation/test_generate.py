from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spd_lens.examples import Example
from spd_lens.generation.corpus import Corpus, CorpusWriter
from spd_lens.generation.generate import generate
from spd_lens.generation.jobs import Decoding, Job, stop_tokens
from spd_lens.generation.slots import Slots
from spd_lens.models.pair import ModelPair
from spd_lens.settings import SamplingSettings
from spd_lens.subspaces.subspace import Subspace
from tests.helpers import EXAMPLES, assert_same_bits, greedy, make_adapter, refused, without_sums

N = 16
HOT = {"temperature": 1.2, "top_p": 0.9}


def made(pair: ModelPair, prompts, **options) -> Corpus:
    return generate(pair, prompts, **({"max_new_tokens": N, "progress": False} | options))


def random_subspace(pair: ModelPair, *, per_head: bool, rank: int) -> Subspace:
    shape = (2, 8) if per_head else (1, 16)
    template = torch.eye(shape[1], dtype=torch.float64)[:, :rank].expand(shape[0], -1, -1).clone()
    sites = pair.sites("last_mid")
    return Subspace(dict.fromkeys(sites, template), dict.fromkeys(sites, (rank,) * shape[0])).random_like(0)


@pytest.fixture(params=["greedy", "sampled"])
def mode(request) -> dict[str, float]:
    return {"temperature": 0.0} if request.param == "greedy" else HOT


@pytest.fixture(params=["unprojected", "per head", "joint, strength 0.5"])
def projection(request, any_tiny_pair) -> dict[str, object]:
    if request.param == "unprojected":
        return {}
    if request.param == "per head":
        return {"subspace": random_subspace(any_tiny_pair, per_head=True, rank=4)}
    return {"subspace": random_subspace(any_tiny_pair, per_head=False, rank=6), "strength": 0.5}


def test_batched_is_one_at_a_time_is_the_lens_under_hooks(any_tiny_pair, tiny_prompts, mode, projection):
    batched = made(any_tiny_pair, tiny_prompts, **mode, **projection)
    assert len({r.completion_ids for r in batched}) == len(tiny_prompts)
    for options in [{"batch_size": 1}, {"batch_size": 4}, {"engine": "lens"}]:
        assert made(any_tiny_pair, tiny_prompts, **options, **mode, **projection).records == batched.records, options
    if projection:
        plain = made(any_tiny_pair, tiny_prompts, **mode)
        assert all(a.completion_ids != b.completion_ids for a, b in zip(plain, batched, strict=True))


def test_greedy_is_the_argmax_of_unpadded_full_recomputation(any_tiny_pair, tiny_prompts):
    corpus = made(any_tiny_pair, tiny_prompts, temperature=0.0)
    for record in corpus:
        ids = list(record.prompt_ids)
        assert ids == any_tiny_pair.format.prompt_ids(record.prompt)
        expected = greedy(lambda t: any_tiny_pair.hf(t, use_cache=False).logits, ids, len(record.completion_ids))
        assert list(record.completion_ids) == expected


def test_adapters_and_projection_together_are_the_merged_lens(tiny_llama_dir, fresh_pair, tiny_prompts, tmp_path):
    adapter = make_adapter(fresh_pair.hf, tmp_path / "adapter")
    subspace = random_subspace(fresh_pair, per_head=True, rank=4)
    base = made(fresh_pair, tiny_prompts, temperature=0.0)
    tuned = made(fresh_pair, tiny_prompts, temperature=0.0, adapter=adapter)
    both = made(fresh_pair, tiny_prompts, temperature=0.0, adapter=adapter, subspace=subspace)
    assert base.records != tuned.records != both.records
    with refused("adapter", "sync"):
        made(fresh_pair, tiny_prompts, adapter=adapter, engine="lens")
    fresh_pair.sync(to="lens", adapter=adapter)
    assert made(fresh_pair, tiny_prompts, temperature=0.0, engine="lens").records == tuned.records
    assert made(fresh_pair, tiny_prompts, temperature=0.0, engine="lens", subspace=subspace).records == both.records


def test_a_completion_depends_on_seed_id_and_sample_alone(tiny_pair, tiny_prompts):
    all_of_them = made(tiny_pair, tiny_prompts, **HOT)
    alone = made(tiny_pair, [Example(tiny_prompts[3], id="3")], **HOT)
    assert alone.records == [all_of_them[3]]
    longer = made(tiny_pair, tiny_prompts, **HOT, max_new_tokens=N + 5)
    for short, long in zip(all_of_them, longer, strict=True):
        assert long.completion_ids[:N] == short.completion_ids
    other_seed = made(tiny_pair, tiny_prompts, **HOT, seed=1)
    assert all(a.completion_ids != b.completion_ids for a, b in zip(other_seed, all_of_them, strict=True))
    renamed = made(tiny_pair, [Example(tiny_prompts[3], id="x")], **HOT)
    assert renamed[0].completion_ids != all_of_them[3].completion_ids


def test_several_samples_per_prompt(tiny_pair, tiny_prompts):
    one = made(tiny_pair, tiny_prompts[:2], **HOT)
    three = made(tiny_pair, tiny_prompts[:2], **HOT, samples_per_prompt=3)
    assert [r.key for r in three] == [(id, sample) for id in "01" for sample in range(3)]
    assert [three[0], three[3]] == one.records
    assert len({r.completion_ids for r in three}) == 6


def test_records_say_what_happened(any_tiny_pair, tiny_prompts):
    # a hot tiny model hits a stop token now and then: both reasons occur
    corpus = made(any_tiny_pair, tiny_prompts, temperature=3.0, top_p=1.0, samples_per_prompt=8, max_new_tokens=60)
    stops = stop_tokens(any_tiny_pair)
    assert {r.finish_reason for r in corpus} == {"eos", "length"}
    for record in corpus:
        *body, last = record.completion_ids
        assert not set(body) & set(stops)
        assert (last in stops) == (record.finish_reason == "eos")
        assert record.finish_reason == "eos" or record.n_completion_tokens == 60
        assert record.completion == any_tiny_pair.tokenizer.decode(record.completion_ids, skip_special_tokens=True)
        assert "<|" not in record.completion
        assert record.prompt in tiny_prompts
        assert record.n_prompt_tokens == len(record.prompt_ids)


def test_a_chat_stops_at_its_end_of_turn_and_a_list_of_eos_counts(tiny_qwen2_pair, fresh_pair, monkeypatch):
    eos, end = (tiny_qwen2_pair.tokenizer.convert_tokens_to_ids(token) for token in ("<|eos|>", "<|end|>"))
    assert stop_tokens(tiny_qwen2_pair) == (eos, end)
    assert stop_tokens(fresh_pair) == (eos,)
    first = made(fresh_pair, ["Tom has"], temperature=0.0)[0]
    assert first.finish_reason == "length"
    monkeypatch.setattr(fresh_pair.hf.generation_config, "eos_token_id", [eos, first.completion_ids[4]])
    cut = made(fresh_pair, ["Tom has"], temperature=0.0)[0]
    assert cut.finish_reason == "eos"
    assert cut.completion_ids == first.completion_ids[: first.completion_ids.index(first.completion_ids[4]) + 1]


def test_settings_are_written_out(tiny_pair, tiny_prompts, tmp_path):
    corpus = made(tiny_pair, tiny_prompts[:2], path=tmp_path / "c.jsonl")
    expected = {
        "model": tiny_pair.name, "dtype": "float32", "engine": "twin", "subspace": None, "strength": None,
        "adapter": None, "prompt_format": "raw", "temperature": 0.7, "top_p": 0.95, "top_k": None, "seed": 42,
        "max_new_tokens": N, "stop_ids": [1],
    }  # fmt: skip
    assert corpus.settings.items() >= expected.items()
    assert corpus.settings["fingerprint"] == tiny_pair.fingerprint.to_dict()
    loaded = Corpus.load(tmp_path / "c.jsonl")
    assert loaded.settings == corpus.settings and loaded.records == corpus.records and loaded.complete


def test_the_twin_is_left_as_it_was_also_after_an_exception(fresh_pair, tiny_prompts, state_of, monkeypatch):
    before, config = state_of(fresh_pair.hf), fresh_pair.hf.generation_config
    subspace = random_subspace(fresh_pair, per_head=True, rank=4)
    made(fresh_pair, tiny_prompts, subspace=subspace)
    monkeypatch.setattr(fresh_pair.tokenizer, "decode", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(fresh_pair, tiny_prompts, subspace=subspace)
    assert_same_bits(fresh_pair.hf, before)
    assert fresh_pair.hf.generation_config is config


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_that_does_not_fit_is_halved(tiny_pair, tiny_prompts, monkeypatch, error):
    undisturbed = made(tiny_pair, tiny_prompts, **HOT)
    sizes, step = [], Slots._step
    room = 2

    def cramped(slots, rows):
        if not sizes or sizes[-1] != slots.n_slots:
            sizes.append(slots.n_slots)
        if len(rows) > room or (len(rows[0].new_ids) > 3 and sizes == [6, 3]):
            raise error
        step(slots, rows)

    monkeypatch.setattr(Slots, "_step", cramped)
    assert made(tiny_pair, tiny_prompts, **HOT).records == undisturbed.records
    assert sizes == [6, 3, 1]
    room = 0
    with refused("not enough memory", "drop_lens"):
        made(tiny_pair, tiny_prompts, **HOT)


def test_what_was_made_before_memory_ran_out_is_kept(tiny_pair, tiny_prompts, tmp_path, monkeypatch):
    undisturbed = made(tiny_pair, tiny_prompts, **HOT)
    admit, admitted = Slots._admit, []

    def cramped(slots, jobs, first):
        admitted.append([job.key for job in jobs])
        if len(admitted) == 2:  # all of the first are done by then
            raise torch.OutOfMemoryError("CUDA out of memory")
        return admit(slots, jobs, first)

    monkeypatch.setattr(Slots, "_admit", cramped)
    assert made(tiny_pair, tiny_prompts, **HOT, batch_size=2).records == undisturbed.records
    first, *_, last = admitted
    assert len(first) == 2 and len(last) == 1
    assert sorted([*first, *(key for keys in admitted[2:] for key in keys)]) == [(str(n), 0) for n in range(6)]


def test_other_runtime_errors_are_not_taken_for_lack_of_memory(tiny_pair, tiny_prompts, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Slots, "_step", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        made(tiny_pair, tiny_prompts)


KILLED = """
import json, os, signal, sys
import torch
from spd_lens.generation.corpus import CorpusWriter
from spd_lens.generation.generate import generate
from spd_lens.models import load

torch.set_num_threads(1)
directory, path, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
append, calls = CorpusWriter.append, []

def dying(self, records):
    calls.append(1)
    if len(calls) == 2:  # in the middle of writing the second batch: one whole record and a half one
        whole = self._sums.copy().add(records[0].to_json())
        os.write(self._file.fileno(), whole + b"\\n" + records[1].to_json()[:40].encode())
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, records)

CorpusWriter.append = dying
pair = load(directory, dtype="float32", device="cpu")
generate(pair, prompts, max_new_tokens=16, temperature=1.2, top_p=0.9, batch_size=2, path=path, progress=False)
"""


def test_killed_and_continued_equals_undisturbed(tiny_llama_dir, tiny_pair, tiny_prompts, tmp_path):
    path = tmp_path / "corpus.jsonl"
    command = [sys.executable, "-c", KILLED, str(tiny_llama_dir), str(path), json.dumps(tiny_prompts)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert child.returncode == -signal.SIGKILL, child.stderr
    partial = Corpus.load(path)
    assert len(partial) == 3 and not partial.complete
    assert not path.read_bytes().endswith(b"\n")
    kept = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]

    undisturbed = made(tiny_pair, tiny_prompts, **HOT, batch_size=2, path=tmp_path / "undisturbed.jsonl")
    resumed = made(tiny_pair, tiny_prompts, **HOT, batch_size=2, path=path)
    assert resumed.records == undisturbed.records == Corpus.load(path).records
    assert path.read_bytes().startswith(kept)
    assert without_sums(path) == without_sums(tmp_path / "undisturbed.jsonl")


def test_a_finished_corpus_is_returned_without_running_the_model(tiny_pair, tiny_prompts, tmp_path, monkeypatch):
    path = tmp_path / "corpus.jsonl"
    first = made(tiny_pair, tiny_prompts, path=path)
    content = path.read_bytes()
    monkeypatch.setattr(Slots, "_admit", lambda *_: 1 / 0)
    assert made(tiny_pair, tiny_prompts, path=path).records == first.records
    assert path.read_bytes() == content


def test_a_corpus_can_be_extended_with_prompts(tiny_pair, tiny_prompts, tmp_path):
    path = tmp_path / "corpus.jsonl"
    first = made(tiny_pair, tiny_prompts[:2], path=path)
    all_of_them = made(tiny_pair, tiny_prompts, path=path)
    assert all_of_them.records[:2] == first.records
    assert all_of_them.records == made(tiny_pair, tiny_prompts).records


def test_a_disk_that_fills_up_leaves_a_corpus_to_continue(tiny_pair, tiny_prompts, tmp_path, monkeypatch):
    path = tmp_path / "corpus.jsonl"
    fsync, calls = os.fsync, []

    def filling(descriptor):
        calls.extend([1] * (os.readlink(f"/proc/self/fd/{descriptor}") == str(path)))
        if len(calls) == 4:  # the empty file, two batches, and then no more
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch, refused("4 completions of 6 are kept", "No space left"):
        patch.setattr(os, "fsync", filling)
        made(tiny_pair, tiny_prompts, batch_size=2, path=path)
    assert len(Corpus.load(path)) == 4
    assert made(tiny_pair, tiny_prompts, batch_size=2, path=path).records == made(tiny_pair, tiny_prompts).records


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"temperature": 0.5},
        {"top_k": 3},
        {"max_new_tokens": 9},
        {"engine": "lens"},
        {"subspace": "random"},
    ],
)
def test_a_corpus_of_other_settings_is_refused_by_name(tiny_pair, tiny_prompts, tmp_path, change):
    path = tmp_path / "corpus.jsonl"
    made(tiny_pair, tiny_prompts[:2], path=path)
    content = path.read_bytes()
    if "subspace" in change:
        change = {"subspace": random_subspace(tiny_pair, per_head=True, rank=4)}
    with refused(next(iter(change)), path):
        made(tiny_pair, tiny_prompts[:2], path=path, **change)
    assert path.read_bytes() == content


def test_a_corpus_of_other_weights_or_another_prompt_is_refused(fresh_pair, tiny_prompts, tmp_path):
    path = tmp_path / "corpus.jsonl"
    made(fresh_pair, tiny_prompts[:2], path=path)
    with refused("another text", "'1'"):
        made(fresh_pair, [tiny_prompts[0], "something else"], path=path)
    with torch.no_grad():
        fresh_pair.hf.model.layers[2].mlp.up_proj.weight.mul_(1.01)
    with refused("weights"):
        made(fresh_pair, tiny_prompts[:2], path=path)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -3}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"samples_per_prompt": 0}, "samples_per_prompt"),
        ({"engine": "vllm"}, "vllm"),
        ({"strength": 2.0}, "strength"),
        ({"max_new_tokens": 10_000}, "context of 256"),
        ({"adapter": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_parameters_are_refused_and_nothing_is_written(tiny_pair, tiny_prompts, tmp_path, options, word):
    with refused(word):
        made(tiny_pair, tiny_prompts, path=tmp_path / "corpus.jsonl", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], ["no prompt"]),
        (["pages " * 300], ["'0'", "256"]),
        ([Example("a", id="same"), Example("b", id="same")], ["'same'"]),
    ],
)
def test_bad_prompts_are_refused(tiny_pair, prompts, words):
    with refused(*words):
        made(tiny_pair, prompts)


def test_a_subspace_of_another_model_is_refused(tiny_pair, tiny_prompts):
    sites = tiny_pair.sites([0])
    foreign = Subspace(dict.fromkeys(sites, torch.eye(6).double()[None]), dict.fromkeys(sites, (6,)))
    for engine in ("twin", "lens"):
        with refused("width"):
            made(tiny_pair, tiny_prompts, subspace=foreign, engine=engine)


def test_one_plain_string_is_one_prompt(tiny_pair):
    assert len(made(tiny_pair, "Tom has 12 apples.")) == 1


def test_the_writer_is_released_after_an_exception(tiny_pair, tiny_prompts, tmp_path, monkeypatch):
    path = tmp_path / "corpus.jsonl"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(CorpusWriter, "append", lambda *_: 1 / 0)
        made(tiny_pair, tiny_prompts, path=path)
    assert made(tiny_pair, tiny_prompts, path=path).complete


def test_logits_that_overflow_name_the_example(tiny_pair):
    decoding = Decoding.of(tiny_pair, SamplingSettings(temperature=0.7, top_p=0.9, top_k=0, max_new_tokens=4))
    rows = [decoding.row(Job(example, 0, [5, 6])) for example in EXAMPLES[:2]]
    logits = torch.zeros(2, tiny_pair.hf.config.vocab_size)
    logits[1, 3] = math.inf  # what float16 makes of a number above 65,504
    with refused("not finite at new token 1 for", repr(EXAMPLES[1].id), "dtype='float32'"):
        decoding.extend(rows, logits)
