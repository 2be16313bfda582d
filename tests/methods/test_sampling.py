"""What methods sample from, and what they keep of it."""

from __future__ import annotations

import pytest
import torch

from spd_lens import methods
from spd_lens.generation.corpus import Corpus, Record
from spd_lens.generation.generate import generate

FLAT = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def made(experiment, name):
    method, config = methods.get(name), experiment.config
    projection = method.projection(experiment)
    return generate(
        experiment.pair, experiment.task.train(config.n_train, config.data_seed), max_new_tokens=config.max_new_tokens,
        subspace=projection and projection.subspace, progress=False, **method.sampling(experiment),
    )  # fmt: skip


def steps(pair, corpus):
    """The unprojected model's float64 logits at each sampled token, and the token."""
    for record in corpus:
        ids = torch.tensor([record.prompt_ids + record.completion_ids])
        with torch.no_grad():
            logits = pair.hf(ids, use_cache=False).logits[0].double()
        for place, token in enumerate(record.completion_ids, start=len(record.prompt_ids)):
            yield logits[place - 1], token


def in_nucleus(logits, token, temperature, top_p, top_k):
    """Plain: sort, keep k, renormalise, walk down until `top_p` is reached; ranks from 0."""
    order = logits.argsort(descending=True).tolist()
    kept = order[:top_k]
    weights = (logits[kept] / temperature).softmax(dim=0).tolist()
    reached, allowed = 0.0, []
    for candidate, weight in zip(kept, weights, strict=True):
        allowed.append(candidate)
        reached += weight
        if reached >= top_p - 1e-6:
            break
    return token in allowed


def rank_of(logits, token):
    return int((logits > logits[token]).sum())


@pytest.mark.parametrize(("name", "temperature"), [("ssd", 1.6), ("ssd-config", 1.5)])
def test_ssd_samples_from_the_truncated_distribution_alone(experiment, name, temperature):
    seen = list(steps(experiment.pair, made(experiment, name)))
    ranks = [rank_of(logits, token) for logits, token in seen]
    assert max(ranks) < 20
    assert sum(rank > 3 for rank in ranks) > len(ranks) / 10  # hot: not just the best few
    assert all(in_nucleus(logits, token, temperature, 0.8, 20) for logits, token in seen)
    # the truncation is where it is said to be: a little narrower, and some tokens fall outside
    assert not all(in_nucleus(logits, token, temperature, 0.7, 20) for logits, token in seen)
    assert not all(in_nucleus(logits, token, temperature, 0.8, 14) for logits, token in seen)


def test_plain_self_retraining_is_not_truncated(tiny_pair, experiment_of):
    plain = experiment_of(tiny_pair, **FLAT)
    assert methods.get("psr").sampling(plain) == {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    seen = list(steps(plain.pair, made(plain, "psr")))
    assert max(rank_of(logits, token) for logits, token in seen) >= 20
    assert not all(in_nucleus(logits, token, 1.6, 0.8, 20) for logits, token in seen)


@pytest.mark.parametrize("name", ["psr", "spd", "spd-random", "spd-complement"])
def test_others_sample_as_the_config_says(tiny_pair, experiment_of, name):
    given = {"temperature": 0.9, "top_p": 0.8, "top_k": 7}
    assert methods.get(name).sampling(experiment_of(tiny_pair, **given)) == given
    assert methods.get(name).sampling(experiment_of(tiny_pair)) == dict.fromkeys(given)


def test_the_configs_sampling_does_not_change_ssd(tiny_pair, experiment_of):
    for own in (experiment_of(tiny_pair, **FLAT), experiment_of(tiny_pair, temperature=0.2, top_p=0.5)):
        assert methods.get("ssd").sampling(own) == {"temperature": 1.6, "top_p": 0.8, "top_k": 20}
        assert methods.get("ssd-config").sampling(own) == {"temperature": 1.5, "top_p": 0.8, "top_k": 20}


def corpus_of(lengths):
    records = [
        Record(str(i), f"prompt {i}", "x" * n, (1,), tuple(range(5, 5 + n)), "eos") for i, n in enumerate(lengths)
    ]
    return Corpus(records, settings={"seed": 3})


@pytest.mark.parametrize("n", [9, 10, 19, 20, 30, 110])
def test_ssd_config_drops_exactly_the_shortest_tenth(n):
    lengths = [1 + (7 * i) % n for i in range(n)]  # a permutation of 1..n when 7 does not divide n
    corpus = corpus_of(lengths)
    kept = methods.get("ssd-config").curated(corpus)
    assert len(kept) == n - n // 10
    assert sorted(record.n_completion_tokens for record in kept) == sorted(lengths)[n // 10 :]
    assert [record.id for record in kept] == sorted((record.id for record in kept), key=int)  # prompt order stays
    assert kept.settings == {"seed": 3, "dropped_shortest": 0.1} and kept.complete
    assert len(corpus) == n


def test_ties_are_dropped_in_order():
    kept = methods.get("ssd-config").curated(corpus_of([5] * 20))
    assert [record.id for record in kept] == [str(i) for i in range(2, 20)]


@pytest.mark.parametrize("name", ["psr", "ssd", "spd", "spd-random-kl"])
def test_others_keep_everything(name):
    corpus = corpus_of([3, 1, 2] * 10)
    assert methods.get(name).curated(corpus) is corpus
