"""Slots against the plain way: every architecture, rows of unequal lengths, refilling, shared prefixes."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from spd_lens.examples import Example
from spd_lens.generation.engines import complete, fitting, plain_batch
from spd_lens.generation.jobs import Decoding, Job
from spd_lens.generation.sampling import Sampling
from spd_lens.generation.slots import MIN_PREFIX, Slots
from spd_lens.models import attention
from spd_lens.models.architectures import takes_slots
from spd_lens.models.pair import ModelPair
from tests.conftest import build_tokenizer
from tests.models.zoo import ZOO, build_twin

GREEDY = Sampling(0.0, 1.0, None)
HOT = Sampling(1.2, 0.9, None)


@pytest.fixture(scope="module", params=sorted(name for name in ZOO if takes_slots(build_twin(name))))
def member(request):
    return ModelPair(build_twin(request.param), build_tokenizer(chat=False))


def jobs_of(pair: ModelPair, lengths, *, prefix: int = 0, seed: int = 0) -> list[Job]:
    noise = random.Random(seed)
    vocabulary = range(5, pair.hf.get_input_embeddings().weight.shape[0])
    shared = noise.choices(vocabulary, k=prefix)
    return [
        Job(Example("", id=str(n)), 0, shared + noise.choices(vocabulary, k=length)) for n, length in enumerate(lengths)
    ]


def recomputed(model, job: Job, decoding: Decoding) -> list[int]:
    """Greedy, without cache or batch."""
    ids = list(job.prompt_ids)
    while len(ids) - len(job.prompt_ids) < decoding.max_new_tokens:
        with torch.no_grad():
            tokens = torch.tensor([ids], device=model.device)
            ids.append(int(model(input_ids=tokens, use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in decoding.stop_ids:
            break
    return ids[len(job.prompt_ids) :]


def by_id(runs) -> dict[str, list[int]]:
    found = [(job.example.id, ids) for completions in runs for job, ids in completions]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("large", [0, 10**9])
def test_every_architecture_makes_the_tokens_of_plain_recomputation(member, large, monkeypatch):
    monkeypatch.setattr(attention, "_LARGE", large)  # elements of a cache from which on a CPU multiplies by itself
    # beyond the window of those that have one (16), which some rows reach before others; more jobs than slots
    jobs = jobs_of(member, [3, 30, 11, 19, 7])
    decoding = Decoding(GREEDY, 0, 14, ())
    expected = {job.example.id: recomputed(member.hf, job, decoding) for job in jobs}
    assert by_id(Slots(member.hf, decoding, 2).run(jobs)) == expected
    assert by_id(Slots(member.hf, decoding, 8).run(jobs)) == expected


def test_a_shared_prefix_is_read_once_and_changes_nothing(member):
    jobs = jobs_of(member, [4, 9, 1], prefix=MIN_PREFIX)
    decoding = Decoding(GREEDY, 0, 6, ())
    read = []
    handle = member.hf.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].shape))
    found = by_id(Slots(member.hf, decoding, 2).run(jobs))
    handle.remove()
    assert found == {job.example.id: recomputed(member.hf, job, decoding) for job in jobs}
    assert [tuple(shape) for shape in read if shape[1] > 1] == [(1, MIN_PREFIX), (2, 9)]


@pytest.mark.parametrize("n_slots", [1, 2, 3, 6])
def test_rows_end_at_stop_tokens_and_the_next_prompt_takes_over(tiny_pair, n_slots):
    jobs = jobs_of(tiny_pair, [3, 30, 11, 19, 7, 5], seed=1)
    unstopped = Decoding(GREEDY, 0, 12, ())
    full = {job.example.id: recomputed(tiny_pair.hf, job, unstopped) for job in jobs}
    stops = tuple({ids[n] for n, ids in zip((0, 3, 6, 9), full.values(), strict=False)})
    decoding = Decoding(GREEDY, 0, 12, stops)
    found = by_id(Slots(tiny_pair.hf, decoding, n_slots).run(jobs))
    ends = {name: next((n for n, token in enumerate(ids) if token in stops), 11) for name, ids in full.items()}
    assert found == {name: ids[: ends[name] + 1] for name, ids in full.items()}
    assert len({len(ids) for ids in found.values()}) >= 3


def test_sampled_tokens_are_those_of_plain_batches(tiny_pair):
    jobs = jobs_of(tiny_pair, [3, 30, 11, 19, 7, 5], seed=2)
    decoding = Decoding(HOT, 7, 12, ())
    plain = dict(zip((job.example.id for job in jobs), plain_batch(tiny_pair, decoding, jobs), strict=True))
    assert by_id(Slots(tiny_pair.hf, decoding, 4).run(jobs)) == plain


def test_prompts_of_similar_length_are_read_together_within_limits(tiny_pair):
    jobs = jobs_of(tiny_pair, [200, 195, 190, 185, 184, 183, 100, 99, 98, 20])
    read = []
    handle = tiny_pair.hf.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].shape))
    found = by_id(Slots(tiny_pair.hf, Decoding(GREEDY, 0, 3, ()), 10).run(jobs))
    handle.remove()
    assert [tuple(shape) for shape in read if shape[1] > 1] == [(5, 200), (1, 183), (3, 100), (1, 20)]
    assert found == {job.example.id: recomputed(tiny_pair.hf, job, Decoding(GREEDY, 0, 3, ())) for job in jobs}


def test_samples_that_begin_together_read_their_prompt_once(tiny_pair):
    [job] = jobs_of(tiny_pair, [20])
    jobs = [Job(job.example, sample, job.prompt_ids) for sample in range(4)]
    decoding = Decoding(HOT, 0, 5, ())
    read = []
    handle = tiny_pair.hf.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].shape))
    found = [(job.sample, ids) for ended in Slots(tiny_pair.hf, decoding, 4).run(jobs) for job, ids in ended]
    handle.remove()
    assert [tuple(shape) for shape in read if shape[1] > 1] == [(1, 20)]
    alone = [plain_batch(tiny_pair, decoding, [job])[0] for job in jobs]
    assert [ids for _, ids in sorted(found)] == alone and len(set(map(tuple, alone))) == 4


def test_an_unknown_architecture_goes_through_generate(tiny_pair, monkeypatch):
    jobs = jobs_of(tiny_pair, [3, 30, 11])
    decoding = Decoding(GREEDY, 0, 6, ())
    known = by_id(complete(tiny_pair, decoding, jobs, 2))
    calls, cls = [], type(tiny_pair.hf)
    generate = cls.generate
    monkeypatch.setattr(cls, "generate", lambda me, **kw: calls.append(kw["input_ids"].shape) or generate(me, **kw))
    monkeypatch.setattr(tiny_pair.hf.config, "model_type", "unheard-of")
    assert by_id(complete(tiny_pair, decoding, jobs, 2)) == known
    assert calls == [(2, 30), (1, 3)]


def test_as_many_as_memory_holds(tiny_pair, monkeypatch):
    jobs, decoding = jobs_of(tiny_pair, [30, 10]), Decoding(GREEDY, 0, 70, ())
    shape = tiny_pair.fingerprint
    row = 2 * shape.n_layers * shape.n_kv_heads * shape.d_head * 100 * 4 + 16 * tiny_pair.hf.config.vocab_size
    for rows, expected in ((0.5, 1), (7.5, 7), (1e6, 32)):
        monkeypatch.setattr("psutil.virtual_memory", lambda rows=rows: type("M", (), {"available": 2 * rows * row}))
        assert fitting(tiny_pair, decoding, jobs) == expected


def test_frequencies_that_are_set_while_generating_can_be_trained_with():
    model = build_twin("llama")
    config = copy.deepcopy(model.config)
    config.max_position_embeddings = 16
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = type(model)(config).eval()
    pair = ModelPair(model, build_tokenizer(chat=False))
    own = {name: x.clone() for name, x in model.named_buffers()}
    for _ in Slots(model, Decoding(GREEDY, 0, 14, ()), 2).run(jobs_of(pair, [12, 9])):
        pass
    assert any(not torch.equal(x, own[name]) for name, x in model.named_buffers() if name in own)
    assert not any(x.is_inference() for x in model.buffers())
    # a gradient that needs the buffer itself
    scale = torch.ones(1, requires_grad=True)
    sum((scale * x).sum() for x in model.buffers()).backward()
    assert scale.grad.isfinite()
