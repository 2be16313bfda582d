"""What a model's generation config asks for, against `generate` of transformers, and what is said of the rest."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from spd_lens.evaluation.evaluate import evaluate
from spd_lens.evaluation.results import EvalResult
from spd_lens.generation.corpus import Corpus, settings_path
from spd_lens.generation.generate import generate
from spd_lens.models.drawing import row_uniforms
from spd_lens.models.load import load
from tests.helpers import refused

N = 14
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

CHANGES_LOGITS = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "a reward for repetition": {"repetition_penalty": 0.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 2.0},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "suppress_tokens": {"suppress_tokens": list(range(50, 300))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(5, 300))},
    "bad_words_ids": {"bad_words_ids": [[n] for n in range(20, 200)]},
    "sequence_bias": {"sequence_bias": {(100,): 9.0, (101, 102): -7.0}},
    "sequence_bias as lists": {"sequence_bias": [[[100], 9.0], [[101, 102], -7.0]]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.2)},
    "watermarking": {"watermarking_config": {"bias": 4.0}},
    "several": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [9, 8], "min_new_tokens": 5},
}
CUTS_OFF = {
    "min_p": {"min_p": 0.2},
    "typical_p": {"typical_p": 0.3},
    "top_h": {"top_h": 0.4},
    "epsilon_cutoff": {"epsilon_cutoff": 0.02},
    "eta_cutoff": {"eta_cutoff": 0.1},
    "after a penalty": {"min_p": 0.2, "repetition_penalty": 1.4},
    "with all three": {"min_p": 0.3, "temperature": 1.3, "top_p": 0.7, "top_k": 20},
    "watermarking": {"watermarking_config": {"bias": 4.0}},
}


@pytest.fixture
def own(fresh_pair):
    """Give the pair a generation config; the pair."""

    def _own(**fields):
        fresh_pair.hf.generation_config = GenerationConfig(**IDS | fields)
        return fresh_pair

    return _own


def made(pair, prompts, **options) -> Corpus:
    return generate(pair, prompts, **({"max_new_tokens": N, "temperature": 0.0, "progress": False} | options))


def by_transformers(pair, prompt_ids, n=N, **options) -> tuple[int, ...]:
    """One prompt alone, greedily, through the model's own `generate`."""
    tokens = torch.tensor([prompt_ids])
    found = pair.hf.generate(input_ids=tokens, do_sample=False, max_new_tokens=n, tokenizer=pair.tokenizer, **options)
    return tuple(found[0, len(prompt_ids) :].tolist())


@pytest.mark.parametrize("name", CHANGES_LOGITS)
def test_greedy_tokens_are_those_of_transformers_one_prompt_at_a_time(own, tiny_prompts, name):
    plain = made(own(), tiny_prompts)
    pair = own(**CHANGES_LOGITS[name])
    corpus = made(pair, tiny_prompts, batch_size=4)
    assert [r.completion_ids for r in corpus] == [by_transformers(pair, r.prompt_ids) for r in corpus]
    assert corpus.records != plain.records
    assert made(pair, tiny_prompts[:2], engine="lens").records == corpus.records[:2]


def test_architectures_without_slots_apply_it_alike(own, tiny_prompts, monkeypatch):
    pair = own(repetition_penalty=1.3, no_repeat_ngram_size=2, stop_strings=["e", "o"])
    in_slots, sampled = made(pair, tiny_prompts), made(pair, tiny_prompts, temperature=1.0)
    monkeypatch.setattr(pair.hf.config, "model_type", "unheard-of")
    config = pair.hf.generation_config
    assert made(pair, tiny_prompts).records == in_slots.records
    assert made(pair, tiny_prompts, temperature=1.0, batch_size=4).records == sampled.records
    assert pair.hf.generation_config is config


@pytest.mark.parametrize("minimum", [{"min_new_tokens": 9}, {"min_length": 30}])
def test_no_end_before_the_minimum(own, tiny_prompts, minimum):
    # a bias towards EOS ends every completion at once where nothing forbids it
    eager = {"sequence_bias": [[[1], 50.0]]}
    assert {r.completion_ids for r in made(own(**eager), tiny_prompts)} == {(1,)}
    pair = own(**eager, **minimum)
    corpus = made(pair, tiny_prompts, max_new_tokens=40)
    assert [r.completion_ids for r in corpus] == [by_transformers(pair, r.prompt_ids, 40) for r in corpus]
    for record in corpus:
        before_eos = minimum.get("min_new_tokens", max(0, 30 - record.n_prompt_tokens))
        assert record.n_completion_tokens == before_eos + 1 and record.finish_reason == "eos"


@pytest.mark.parametrize("strings", [["e", "o"], "a", ["\n", "##"], ["qqqq"]])
def test_stop_strings(own, tiny_prompts, strings):
    pair = own(stop_strings=strings)
    corpus = made(pair, tiny_prompts, samples_per_prompt=1, max_new_tokens=30)
    assert [r.completion_ids for r in corpus] == [by_transformers(pair, r.prompt_ids, 30) for r in corpus]
    for record in corpus:
        assert (record.finish_reason == "stop") == any(string in record.completion for string in strings)
    assert {"stop"} <= {r.finish_reason for r in corpus} or strings == ["qqqq"]
    assert made(pair, tiny_prompts[:2], max_new_tokens=30, engine="lens").records == corpus.records[:2]


def test_a_stop_string_that_the_prompt_begins(own):
    pair = own(sequence_bias=[[[81], 50.0]], stop_strings=["\nm"])  # always "m", and raw prompts end with \n
    record = made(pair, ["Tom has 12 apples."])[0]
    assert record.completion == "m" and record.finish_reason == "stop"
    assert record.completion_ids == by_transformers(pair, record.prompt_ids)


@pytest.mark.parametrize("name", CUTS_OFF)
def test_what_is_drawn_from_is_the_distribution_of_transformers(own, tiny_prompts, name):
    """Each token is the one at which the noise falls in the cumulative distribution of transformers' own scores."""
    fields = {"temperature": 0.9, "top_p": 0.95, "top_k": 0} | CUTS_OFF[name]
    pair = own(do_sample=True, **fields)
    corpus = made(pair, tiny_prompts[:3], temperature=None, batch_size=2)
    for record in corpus:
        noise = row_uniforms(42, record.id, 0, N)
        for step, token in enumerate(record.completion_ids):
            tokens = torch.tensor([[*record.prompt_ids, *record.completion_ids[:step]]])
            given = pair.hf.generate(tokens, max_new_tokens=1, output_scores=True, return_dict_in_generate=True)
            share = given.scores[0][0].double().softmax(-1).numpy().cumsum()
            assert token == np.searchsorted(share, noise[step] * share[-1], side="right")
    assert made(pair, tiny_prompts[:2], temperature=None, engine="lens").records == corpus.records[:2]
    usual = {name: fields[name] for name in ("temperature", "top_p", "top_k")}
    assert made(own(**usual), tiny_prompts[:3], temperature=None).records != corpus.records


def test_cut_offs_do_nothing_to_greedy_completions_and_are_not_recorded(own, tiny_prompts):
    plain = made(own(), tiny_prompts)
    corpus = made(own(do_sample=False, **CUTS_OFF["min_p"], typical_p=0.4), tiny_prompts)
    assert corpus.records == plain.records and corpus.settings == plain.settings


def test_a_completion_depends_on_no_neighbour_and_no_interruption(own, tiny_prompts, tmp_path):
    pair = own(repetition_penalty=1.2, min_p=0.05, no_repeat_ngram_size=2, stop_strings=["e"])
    options = {"temperature": 1.2, "path": tmp_path / "c.jsonl"}
    whole = made(pair, tiny_prompts, temperature=1.2)
    alone = [made(pair, tiny_prompts, temperature=1.2, batch_size=1), made(pair, tiny_prompts[:1], **options)]
    assert alone[0].records == whole.records and alone[1].records == whole.records[:1]
    assert made(pair, tiny_prompts, **options, batch_size=4).records == whole.records


@pytest.mark.parametrize(
    ("fields", "applied", "not_applied", "level"),
    [
        ({"do_sample": False}, {}, {"do_sample": False}, logging.WARNING),
        ({"do_sample": False, "temperature": 0.6}, {}, {"do_sample": False}, logging.WARNING),
        ({"num_beams": 4, "length_penalty": 2.0}, {}, {"num_beams": 4, "length_penalty": 2.0}, logging.WARNING),
        ({"penalty_alpha": 0.6}, {}, {"penalty_alpha": 0.6}, logging.WARNING),
        ({"guidance_scale": 1.5}, {}, {"guidance_scale": 1.5}, logging.WARNING),
        ({"forced_eos_token_id": 0}, {}, {"forced_eos_token_id": 0}, logging.WARNING),
        ({"max_time": 2.0, "token_healing": True}, {}, {"max_time": 2.0, "token_healing": True}, logging.WARNING),
        ({"max_length": 4096}, {}, {"max_length": 4096}, logging.INFO),
        ({"cache_implementation": "static"}, {}, {"cache_implementation": "static"}, logging.INFO),
        ({"prompt_lookup_num_tokens": 3}, {}, {"prompt_lookup_num_tokens": 3}, logging.INFO),
        ({"repetition_penalty": 1.1, "top_k": 20, "do_sample": True}, {"repetition_penalty": 1.1}, {}, logging.INFO),
        ({"exponential_decay_length_penalty": (3, 1.2)}, {"exponential_decay_length_penalty": [3, 1.2]}, {}, 20),
        ({"forced_bos_token_id": 0}, {"forced_bos_token_id": 0}, {}, logging.INFO),
        ({"suppress_tokens": torch.tensor([9, 8])}, {"suppress_tokens": [9, 8]}, {}, logging.INFO),
        ({"sequence_bias": {(7,): 2.0}}, {"sequence_bias": [[[7], 2.0]]}, {}, logging.INFO),
    ],
)
def test_each_setting_is_applied_or_named(own, tiny_prompts, tmp_path, caplog, fields, applied, not_applied, level):
    pair = own(**fields)
    with caplog.at_level(logging.INFO, "spd_lens.generation.model_settings"):
        corpus = made(pair, tiny_prompts[:1], temperature=None, path=tmp_path / "c.jsonl")
    [said] = caplog.records
    assert said.levelno == level and all(f"{name} = " in said.getMessage() for name in (*applied, *not_applied))
    written = json.loads(settings_path(tmp_path / "c.jsonl").read_text())["settings"]
    assert written == corpus.settings
    assert written.get("generation_config", {}) == applied
    assert written.get("generation_config_not_applied", {}) == not_applied
    again = made(pair, tiny_prompts[:2], temperature=None, path=tmp_path / "c.jsonl")
    assert again.records[:1] == corpus.records


NEUTRAL = {
    "do_sample": True, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": 0.0, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "num_beams": 1, "suppress_tokens": [], "min_length": 0, "guidance_scale": 1.0,
    "renormalize_logits": True, "use_cache": True, "penalty_alpha": 0.0, "max_length": 20, "length_penalty": 1.0,
    "top_k": 50,
}  # fmt: skip


def test_a_config_that_asks_for_nothing_leaves_no_trace(own, tiny_prompts, caplog):
    plain = made(own(), tiny_prompts[:2], temperature=0.8, top_k=0)
    with caplog.at_level(logging.INFO, "spd_lens.generation.model_settings"):
        corpus = made(own(**NEUTRAL, chat_format="chatml"), tiny_prompts[:2], temperature=0.8, top_k=0)
    assert corpus.records == plain.records and corpus.settings == plain.settings and not caplog.records


def test_do_sample_false_samples_at_what_else_the_config_sets(own, tiny_prompts):
    """Eq. 13 samples: a corpus of greedy completions is asked for with temperature 0."""
    alone, warm = own(do_sample=False), {"temperature": 0.6, "top_p": 0.9}
    assert made(alone, tiny_prompts, temperature=None).records == made(own(), tiny_prompts, temperature=0.7).records
    corpus = made(own(do_sample=False, **warm), tiny_prompts, temperature=None)
    assert corpus.records == made(own(), tiny_prompts, **warm).records


def test_a_corpus_of_another_generation_config_is_refused_and_one_before_the_note_goes_on(own, tiny_prompts, tmp_path):
    path = tmp_path / "c.jsonl"
    first = made(own(), tiny_prompts[:1], path=path)
    assert made(own(num_beams=2), tiny_prompts[:2], path=path).records[:1] == first.records
    with refused("generation_config", "repetition_penalty", path):
        made(own(repetition_penalty=1.1), tiny_prompts[:2], path=path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"repetition_penalty": 0.0}, ("repetition_penalty = 0.0", "strictly positive float")),
        ({"repetition_penalty": -1.0}, ("repetition_penalty = -1.0", "strictly positive float")),
        ({"bad_words_ids": [5, 6]}, ("bad_words_ids = [5, 6]",)),
        ({"sequence_bias": [[[4000], 1.0]]}, ("sequence_bias", "4000")),
        ({"min_p": 3.0, "do_sample": True}, ("min_p = 3.0",)),
        ({"suppress_tokens": list(range(5000))}, ("no token to choose", "suppress_tokens")),
        ({"no_repeat_ngram_size": "two"}, ("no_repeat_ngram_size",)),
        ({"stop_strings": 7}, ("stop_strings = 7",)),
    ],
)
def test_a_config_that_cannot_be_applied_is_refused(own, tiny_prompts, tmp_path, fields, words):
    with refused(*words, "generation_config"):
        made(own(**fields), tiny_prompts[:1], temperature=None, path=tmp_path / "c.jsonl")
    assert not (tmp_path / "c.jsonl").exists()


def test_an_evaluation_applies_and_records_it(own, tmp_path):
    pair = own(repetition_penalty=1.3, do_sample=False, max_length=99)
    result = evaluate(pair, "synthetic-math", 3, max_new_tokens=N, progress=False)
    plain = evaluate(own(), "synthetic-math", 3, max_new_tokens=N, progress=False)
    assert all(a.completion != b.completion for a, b in zip(result.items, plain.items, strict=True))
    own(repetition_penalty=1.3)
    for item in result.items:
        ids = by_transformers(pair, pair.format.prompt_ids(item.prompt))
        assert item.completion == pair.tokenizer.decode(ids, skip_special_tokens=True)
    assert result.settings["generation_config"] == {"repetition_penalty": 1.3}
    assert result.settings["generation_config_not_applied"] == {"max_length": 99}  # greedy, as `do_sample: false` asks
    assert EvalResult.load(result.save(tmp_path / "e.json")).settings == result.settings
    assert "generation_config" not in plain.settings


def test_it_is_read_from_the_models_directory(tiny_llama_dir, tiny_prompts, tmp_path):
    for file in tiny_llama_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps(IDS | {"repetition_penalty": 1.3, "do_sample": False}))
    pair = load(str(tmp_path), dtype="float32", device="cpu")
    corpus = made(pair, tiny_prompts[:2])
    assert corpus.settings["generation_config"] == {"repetition_penalty": 1.3}
    assert [r.completion_ids for r in corpus] == [by_transformers(pair, r.prompt_ids) for r in corpus]
