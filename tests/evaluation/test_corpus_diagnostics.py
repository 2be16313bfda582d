"""Diagnostics of a corpus, against counts made by hand and plain references."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spd_lens import tasks
from spd_lens.evaluation.corpus_diagnostics import (
    GROUP,
    corpus_diagnostics,
    ends_in_loop,
    longest_loop,
    repeated_ngrams,
    settled_at,
    share_after_answer,
)
from spd_lens.generation.corpus import Corpus, Record
from spd_lens.generation.generate import generate
from spd_lens.stats.intervals import mean_interval, wilson
from tests.helpers import refused

MATH = tasks.get("synthetic-math")


def record(id, ids, text=None, *, finish="eos", sample=0):
    """A completion of some tokens; an EOS (9) is put behind them where it ended by itself."""
    text = " ".join(map(str, ids)) if text is None else text
    return Record(str(id), "p", text, (1,), tuple(ids) + ((9,) if finish == "eos" else ()), finish, sample)


def measured(corpus, *arguments, **options):
    frame = corpus_diagnostics(corpus, *arguments, **options)
    assert list(frame.columns) == ["measure", "value", "low", "high", "n", "unit", "interval"]
    assert frame.measure.is_unique and frame.value.notna().all() and (frame.interval != "").all()
    bounded = frame.dropna(subset=["low", "high"])
    assert ((bounded.low <= bounded.value) & (bounded.value <= bounded.high)).all()
    return frame.set_index("measure")


def test_lengths_and_shares_by_hand():
    lengths = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 30]
    corpus = [record(i, range(10, 10 + n - 1)) for i, n in enumerate(lengths[:-2])]  # EOS is a token too
    corpus += [record(10, range(10, 21), finish="length"), record(11, range(10, 40), finish="length")]
    found = measured(corpus)
    assert found.value[["completions", "prompts"]].tolist() == [12, 12]
    assert found.value["length"] == np.mean(lengths) and found.value["length median"] == 6.5
    assert found.value["length sd"] == pytest.approx(np.std(lengths, ddof=1))
    assert found.value[["shortest", "longest"]].tolist() == [1, 30]
    assert found.value["length 10 %"] == pytest.approx(np.quantile(lengths, 0.1))
    assert found.value["length 90 %"] == pytest.approx(np.quantile(lengths, 0.9))
    interval = mean_interval(lengths)
    assert (found.low["length"], found.high["length"]) == (interval.low, interval.high)
    for measure, count in {"short": 2, "truncated": 2, "empty": 1, "duplicates": 0}.items():
        share = wilson(count, 12)
        assert (found.value[measure], found.low[measure], found.high[measure]) == (share.value, share.low, share.high)


def test_duplicates_in_the_corpus_and_within_prompts():
    texts = [["a", "a", "a"], ["b", "c", "b"], ["d", "e", "f"], ["a", "g", "h"]]
    corpus = [record(p, [5], text, sample=s) for p, own in enumerate(texts) for s, text in enumerate(own)]
    found = measured(corpus)
    # a, a again of prompt 0; b again of prompt 1; a of prompt 3
    assert found.value["duplicates"] == 4 / 12
    assert found.value["duplicates within prompts"] == pytest.approx((1 + 1 / 2 + 0 + 0) / 4)
    assert (found.n[["duplicates", "duplicates within prompts"]] == 4).all()
    assert "duplicates within prompts" not in measured([record(i, [5]) for i in range(3)]).index


def test_several_samples_do_not_narrow_an_interval():
    """The same completions four times over are no more prompts than before."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(10, 50, size=n).tolist() for n in rng.integers(3, 30, size=40)]
    once = measured([record(p, own) for p, own in enumerate(ids)])
    often = measured([record(p, own, sample=s) for p, own in enumerate(ids) for s in range(4)])
    for measure in ("length", "length median", "truncated", "repeated 4-grams", "distinct-2"):
        assert often.loc[measure, ["value", "low", "high", "n"]].tolist() == pytest.approx(
            once.loc[measure, ["value", "low", "high", "n"]].tolist()
        ), measure


@pytest.mark.parametrize(
    ("ids", "share"),
    [([1, 2, 3], 0), ([1, 2, 3, 4], 0), ([1] * 8, 4 / 5), ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5), (list(range(9)), 0)],
)
def test_repeated_ngrams_by_hand(ids, share):
    assert repeated_ngrams(ids) == pytest.approx(share)


@pytest.mark.parametrize(
    ("ids", "tokens"),
    [
        ([], 0), ([1], 0), ([1, 2, 3], 0), ([1, 1], 1), ([1, 2, 1], 0), ([1, 2, 1, 2], 2), ([7, 1, 2, 3] * 3, 8),
        ([5, 1, 2, 1, 2, 1, 6, 6, 6], 3), ([1, 2, 3, 4, 1, 2, 3, 5], 0),
    ],
)  # fmt: skip
def test_longest_loop_by_hand(ids, tokens):
    assert longest_loop(ids) == tokens


def plain_loop(ids):
    """Every stretch, every period, in plain loops."""
    best = 0
    for start in range(len(ids)):
        for period in range(1, start + 1):
            end = start
            while end < len(ids) and ids[end] == ids[end - period]:
                end += 1
            if end - start >= period:
                best = max(best, end - start)
    return best


def test_longest_loop_against_plain_loops():
    rng = np.random.default_rng(1)
    for _ in range(200):
        ids = rng.integers(0, rng.integers(1, 4), size=rng.integers(0, 25)).tolist()
        assert longest_loop(ids) == plain_loop(ids), ids


@pytest.mark.parametrize(
    ("ids", "is_loop"),
    [
        ([1, 2] * 3, True), ([1, 2] * 2, False), ([8, 9, 1, 2, 1, 2, 1, 2], True), ([1, 2, 1, 2, 1, 2, 3], False),
        ([1] * 6, True), ([1] * 5, False), ([1, 2, 3, 1, 2, 3, 1, 2, 3, 1], True), ([], False), ([1, 2, 3], False),
    ],
)  # fmt: skip
def test_loops_at_the_end(ids, is_loop):
    assert ends_in_loop(ids) is is_loop


def test_the_eos_token_is_no_text():
    looping = record(0, [1, 2] * 3)
    assert measured([looping]).value["loops"] == 1
    assert measured([record(0, [1, 2] * 3, finish="length")]).value["loops"] == 1
    assert measured([record(0, [])]).value["empty"] == 1
    assert measured([record(0, [4, 4, 4, 4, 4])]).value["repeated 4-grams"] == 0.5


def test_distinct_does_not_depend_on_the_size_of_the_corpus():
    rng = np.random.default_rng(2)
    corpus = [record(i, rng.integers(10, 60, size=20).tolist()) for i in range(400)]
    small, large = measured(corpus[:100]), measured(corpus)
    for measure in ("distinct-1", "distinct-2"):
        assert small.value[measure] == pytest.approx(large.value[measure], rel=0.02)
        assert small.n[measure] == 10 and large.n[measure] == 40
    # by hand: two pools of ten, the incomplete third left out
    corpus = [record(i, [10, 11]) for i in range(GROUP)] + [record(i, [20 + i, 50 + i]) for i in range(10, 25)]
    assert measured(corpus).value["distinct-1"] == pytest.approx((2 / 20 + 1) / 2)
    few = measured(corpus[:3])
    assert few.value["distinct-1"] == pytest.approx(2 / 6) and math.isnan(few.low["distinct-1"])


ANSWERED = {
    "5 + 7 = 12\n#### 12": 0,
    "5 + 3 = 8\n#### 8": 0,
    "5 + 7 = 12\n#### 12\n\n": 0,
    "#### 12 Now": 4,
    "#### 12\n#### 12\n#### 12": 16,
    "12 apples, then\n#### 13\nQuestion: 5 + 5?": 17,
    "5 + 7 = 12 apples in all.": 15,
}
"""Completions, and how many characters stand behind the answer."""


@pytest.mark.parametrize("text", ANSWERED)
def test_what_stands_behind_the_answer(text):
    body = text.rstrip()
    assert len(body) - settled_at(body, MATH) == ANSWERED[text]
    characters = record(0, [5], text)
    assert share_after_answer(characters, MATH) == pytest.approx(ANSWERED[text] / len(body))


def test_an_answer_that_changes_is_settled_at_the_last_change():
    choice = tasks.get("synthetic-qa")
    text = "Answer: B\nNo, that is not it.\nAnswer: C\nthat is all"
    assert choice.extract(text) == "C"
    assert text[: settled_at(text, choice)] == "Answer: B\nNo, that is not it.\nAnswer: C"
    assert settled_at("nothing here", choice) == len("nothing here")
    code = tasks.get("synthetic-code")
    text = "```python\ndef f(x):\n    return x\n```\nThis function returns x."
    assert text[: settled_at(text, code)].endswith("```")


@pytest.mark.parametrize("name", ["synthetic-math", "synthetic-qa", "synthetic-code"])
def test_gold_completions_have_nothing_behind_the_answer(name):
    task = tasks.get(name)
    corpus = [record(item.id, [5], item.completion) for item in task.test(20, 0)]
    found = measured(corpus, None, task)
    assert found.value[["answered", "in the asked form", "after the answer"]].tolist() == [1, 1, 0]


def test_tokens_behind_the_answer_are_counted_in_tokens(tiny_pair):
    for text in ANSWERED:
        ids = tiny_pair.tokenizer(text.rstrip(), add_special_tokens=False)["input_ids"]
        made = Record("0", "p", text, (1,), (*ids, 1), "eos")
        decode = lambda ids: tiny_pair.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731 (a plain reference)
        place = settled_at(text.rstrip(), MATH)
        n_before = next(n for n in range(len(ids) + 1) if len(decode(ids[:n])) >= place)
        assert share_after_answer(made, MATH, decode) == pytest.approx(1 - n_before / len(ids))
    corpus = [Record(str(i), "p", text, (1,), (*tiny_pair.tokenizer(text)["input_ids"], 1), "eos")
              for i, text in enumerate([*ANSWERED, "no number"])]  # fmt: skip
    found = measured(corpus, tiny_pair, MATH)
    assert found.value["answered"] == 7 / 8 and found.value["in the asked form"] == 6 / 8
    assert found.n["after the answer"] == 7 and 0 < found.value["after the answer"] < 1
    same = measured(corpus, tiny_pair.tokenizer, MATH)
    assert same.value["after the answer"] == found.value["after the answer"]
    assert measured(corpus, None, MATH).value["after the answer"] != found.value["after the answer"]


def test_a_generated_corpus(tiny_pair, tiny_prompts):
    corpus = generate(tiny_pair, tiny_prompts, max_new_tokens=12, temperature=1.0, samples_per_prompt=2, progress=False)
    found = measured(corpus, tiny_pair, MATH)
    assert found.value["prompts"] == 6 and found.value["completions"] == 12
    assert found.value["length"] == pytest.approx(np.mean([r.n_completion_tokens for r in corpus]))


def test_an_empty_corpus_is_refused():
    with refused("empty"):
        corpus_diagnostics(Corpus([]))
