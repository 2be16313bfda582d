"""Prompts that are cut behind a number of tokens: what the model is given, what is recorded, and what then fits."""

from __future__ import annotations

import json

import pytest

from spd_lens.generation.corpus import Corpus, settings_path
from spd_lens.generation.generate import check_room, generate
from spd_lens.models.pair import ModelPair
from tests.conftest import N_CTX
from tests.helpers import greedy, refused

CUT = 9


def made(pair: ModelPair, prompts, **options) -> Corpus:
    return generate(pair, prompts, **({"max_new_tokens": 12, "progress": False, "temperature": 0.0} | options))


def test_the_first_tokens_are_what_is_completed_and_recorded(any_tiny_pair, tiny_prompts):
    whole = [any_tiny_pair.format.prompt_ids(prompt) for prompt in tiny_prompts]
    assert min(map(len, whole)) < max(map(len, whole))
    for engine in ("twin", "lens"):
        corpus = made(any_tiny_pair, tiny_prompts, max_prompt_tokens=CUT, engine=engine)
        for record, ids, prompt in zip(corpus, whole, tiny_prompts, strict=True):
            assert record.prompt_ids == tuple(ids[:CUT])
            assert record.prompt == prompt
            plain = greedy(lambda tokens: any_tiny_pair.hf(tokens).logits, ids[:CUT], 12)
            assert list(record.completion_ids) == plain[: record.n_completion_tokens]
        assert corpus.settings["max_prompt_tokens"] == CUT


def test_a_cut_that_cuts_nothing_changes_nothing_but_the_record(tiny_pair, tiny_prompts):
    plain, cut = made(tiny_pair, tiny_prompts), made(tiny_pair, tiny_prompts, max_prompt_tokens=N_CTX)
    assert cut.records == plain.records
    assert "max_prompt_tokens" not in plain.settings
    assert cut.settings == plain.settings | {"max_prompt_tokens": N_CTX}


def test_a_corpus_of_cut_prompts_goes_on_with_the_same_cut(tiny_pair, tiny_prompts, tmp_path):
    path = tmp_path / "corpus.jsonl"
    whole = made(tiny_pair, tiny_prompts, max_prompt_tokens=CUT)
    made(tiny_pair, tiny_prompts[:3], max_prompt_tokens=CUT, path=path)
    for other in (None, CUT + 1):
        with refused(f"max_prompt_tokens = {CUT}", f"max_prompt_tokens = {'null' if other is None else other}"):
            made(tiny_pair, tiny_prompts, max_prompt_tokens=other, path=path)
    assert made(tiny_pair, tiny_prompts, max_prompt_tokens=CUT, path=path).records == whole.records
    assert json.loads(settings_path(path).read_text())["settings"]["max_prompt_tokens"] == CUT


@pytest.mark.parametrize("repeats", [60, 6000], ids=["beyond", "far beyond"])
def test_a_prompt_beyond_the_context_fits_when_it_is_cut(tiny_pair, repeats):
    long = "Tom has 12 apples. " * repeats
    assert tiny_pair.format.prompt_ids(long, CUT) == tiny_pair.tokenizer(f"{long}\n")["input_ids"][:CUT]
    with refused("tokens", "context"):
        made(tiny_pair, [long])
    [record] = made(tiny_pair, [long], max_prompt_tokens=CUT)
    assert len(record.prompt_ids) == CUT
    check_room(tiny_pair, [long], 12, CUT)
    with refused("leaves room for 2", "context"):
        check_room(tiny_pair, [long], 12, N_CTX - 2)


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "many"])
def test_a_cut_that_is_no_number_of_tokens_is_refused(tiny_pair, value):
    with refused("max_prompt_tokens", repr(value)):
        made(tiny_pair, ["a"], max_prompt_tokens=value)
