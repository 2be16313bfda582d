"""`evaluate` on a task of the tests' own: completions, the task's verdicts, measures, and what stays in files."""

import json
import math
from dataclasses import dataclass, replace
from statistics import fmean
from typing import ClassVar

import pytest

from spd_lens.errors import SPDError
from spd_lens.evaluation.evaluate import evaluate
from spd_lens.evaluation.results import EvalResult, ItemResult
from spd_lens.evaluation.teacher_forced import teacher_forced
from spd_lens.examples import Example
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.policy import Policy
from spd_lens.subspaces.projection import folded
from spd_lens.tasks.base import Pools, Task
from tests.helpers import EXAMPLES, assert_same_bits, greedy, make_adapter, refused

LIMIT = 6


@dataclass(kw_only=True)
class Letters(Task):
    """Scores the share of letters among the first three characters, so that verdicts vary with the completion."""

    name: ClassVar[str] = "letters"
    max_new_tokens: int = LIMIT

    def load(self):
        # the last two are prompts without spans: no gold tokens to measure on
        return Pools(
            train=[], test=[*EXAMPLES, Example("Say something.", id="open"), Example("5 + 5", "10", id="bare")]
        )

    def extract(self, text):
        return text[:3] or None

    def score(self, item, text):
        return sum(c.isalpha() for c in text[:3]) / 3

    def sources(self):
        return {}


N = len(EXAMPLES) + 2


@pytest.fixture(scope="module")
def subspace(tiny_pair):
    return extract(tiny_pair, EXAMPLES, layers="all", engine="twin", progress=False).subspace(2)


@pytest.fixture(scope="module")
def adapter(tiny_pair, tmp_path_factory):
    return make_adapter(tiny_pair.hf, tmp_path_factory.mktemp("adapter"), std=0.3)


def scored(pair, **options):
    return evaluate(pair, Letters(), N, progress=False, **options)


def expected_completions(pair, model):
    """By greedy decoding without cache or batches, up to the first stop token."""
    texts = {}
    for item in Letters().test(N, 42):
        ids = greedy(lambda tokens: model(tokens, use_cache=False).logits, pair.prompt_ids(item), LIMIT)
        end = next((i + 1 for i, token in enumerate(ids) if token == pair.tokenizer.eos_token_id), LIMIT)
        texts[item.id] = pair.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts


@pytest.mark.parametrize("which", ["base", "projected", "tuned", "tuned+projected"])
def test_each_policy_completes_greedily_and_is_scored(tiny_pair, subspace, adapter, which, state_of):
    before = state_of(tiny_pair.hf)
    own = subspace if "projected" in which else None
    tune = adapter if "tuned" in which else None
    result = scored(tiny_pair, subspace=own, adapter=tune)
    with Policy("p", own, 1.0, tune).applied(tiny_pair) as model:
        expected = expected_completions(tiny_pair, model)
    assert result.policy == which
    assert {item.id: item.completion for item in result.items} == expected
    task = Letters()
    for item, example in zip(result.items, task.test(N, 42), strict=True):
        assert (item.id, item.prompt, item.gold) == (example.id, example.prompt, example.completion)
        assert item.answer == task.extract(item.completion)
        assert item.score == task.score(example, item.completion)
        assert (item.finish_reason == "length") == (item.n_tokens == LIMIT)
    assert_same_bits(tiny_pair.hf, before)


def test_the_policies_say_different_things(tiny_pair, subspace, adapter):
    results = [scored(tiny_pair, **o) for o in ({}, {"subspace": subspace}, {"adapter": adapter})]
    texts = {tuple(item.completion for item in result.items) for result in results}
    assert len(texts) == 3
    assert len({result.accuracy.value for result in results}) > 1  # and are scored differently


def test_measures_where_there_are_spans(tiny_pair, subspace):
    result = scored(tiny_pair, subspace=subspace)
    found = {
        item.id: item for item in teacher_forced(tiny_pair, EXAMPLES, [Policy("p", subspace)], progress=False)["p"]
    }
    for item in result.items:
        if item.id in ("open", "bare"):
            assert (item.aligned_loss, item.completion_loss, item.kl) == (None, None, None)
        else:
            assert item.aligned_loss == pytest.approx(found[item.id].aligned_loss, rel=1e-5)
            assert item.kl == pytest.approx(found[item.id].kl, rel=1e-4)
    assert result.aligned_loss.n == len(EXAMPLES)
    assert result.aligned_loss.value == pytest.approx(
        sum(i.aligned_loss for i in found.values()) / len(found), rel=1e-5
    )


def test_no_item_with_spans(tiny_pair):
    class Open(Letters):
        def load(self):
            return Pools(train=[], test=[Example(f"Say {n}.", id=str(n)) for n in range(3)])

    result = evaluate(tiny_pair, Open(), 3, progress=False)
    assert (result.aligned_loss, result.kl) == (None, None)
    assert "aligned loss" not in repr(result)


def test_what_is_known_is_not_measured_again(tiny_pair, subspace):
    known = teacher_forced(tiny_pair, EXAMPLES, [Policy("p", subspace)], progress=False)["p"]
    marked = [replace(item, kl=7.0) for item in known]
    result = scored(tiny_pair, subspace=subspace, forced=marked)
    assert {item.kl for item in result.items} == {7.0, None}


def test_strength_and_name(tiny_pair, subspace):
    half = scored(tiny_pair, subspace=subspace, strength=0.5, name="half")
    with folded(tiny_pair.hf, subspace, 0.5):
        expected = expected_completions(tiny_pair, tiny_pair.hf)
    assert (half.policy, half.settings["strength"]) == ("half", 0.5)
    assert {item.id: item.completion for item in half.items} == expected


def test_batch_size_does_not_matter(tiny_pair, subspace):
    one, many = (scored(tiny_pair, subspace=subspace, batch_size=size) for size in (1, 8))
    assert [item.completion for item in one.items] == [item.completion for item in many.items]


def test_an_interrupted_evaluation_goes_on(tiny_pair, tmp_path):
    path = tmp_path / "base.jsonl"
    whole = scored(tiny_pair, path=path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    assert scored(tiny_pair, path=path).items == whole.items
    assert len(path.read_bytes().splitlines()) == N


def test_limits(tiny_pair, tmp_path):
    assert {item.n_tokens for item in scored(tiny_pair, max_new_tokens=1).items} == {1}
    with refused("max_new_tokens", "0"):
        scored(tiny_pair, max_new_tokens=0)
    with refused("prompt", "context of 256", "max_new_tokens"):  # before anything is measured or written
        scored(tiny_pair, max_new_tokens=240, path=tmp_path / "x.jsonl")
    assert not any(tmp_path.iterdir())


def test_task_by_name(tiny_pair):
    with refused("'lettrs'", "gsm8k"):
        evaluate(tiny_pair, "lettrs", 3, progress=False)


def test_a_task_that_cannot_be_scored_here_is_refused_first(tiny_pair, tmp_path):
    class Unscorable(Letters):
        def check_scorable(self):
            raise SPDError("no sandbox here")

    with refused("no sandbox here"):
        evaluate(tiny_pair, Unscorable(), N, progress=False, path=tmp_path / "x.jsonl")
    assert not any(tmp_path.iterdir())


def item(id, score=1.0, **fields):
    base = {"prompt": "q", "gold": "g", "completion": "c", "answer": None, "n_tokens": 3, "finish_reason": "eos"}
    return ItemResult(id=id, score=score, **{**base, **fields})


def test_save_and_load(tmp_path):
    items = [item("a", 0.25, answer="é | \n", aligned_loss=1.5, completion_loss=1e-9, kl=0.0), item("b")]
    result = EvalResult("spd", "t", items, {"n": 2, "task_options": {"x": None}})
    assert EvalResult.load(result.save(tmp_path / "deep" / "r.json")) == result


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '"x"', '{"kind": "Corpus"}', '{"kind": "EvalResult"}',
                '{"kind": "EvalResult", "policy": "p", "task": "t", "settings": {}, "items": [{"id": 1}]}']
)  # fmt: skip
def test_damaged_or_foreign_files(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_text(content)
    with refused(path):
        EvalResult.load(path)


def test_accuracy_has_wilsons_interval():
    n, right, z = 40, 13, 1.959963984540054
    result = EvalResult("p", "t", [item(str(i), float(i < right)) for i in range(n)])
    centre = (right / n + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(right / n * (1 - right / n) / n + z**2 / (4 * n**2))
    accuracy = result.accuracy
    assert (accuracy.value, accuracy.n) == (right / n, n)
    assert (accuracy.low, accuracy.high) == pytest.approx((centre - half, centre + half), rel=1e-9)


def test_items_that_cannot_be_judged_are_counted_apart(tiny_pair, tmp_path):
    class Partial(Letters):
        def judges(self, item):
            return item.id != "bare"

    result = evaluate(tiny_pair, Partial(), N, progress=False)
    assert [one.id for one in result.items if not one.judged] == ["bare"]
    read = EvalResult.load(result.save(tmp_path / "r.json"))
    assert (read, read.n_unjudged, read.accuracy.n) == (result, 1, N - 1)
    assert read.accuracy.value == pytest.approx(fmean(one.score for one in result.items if one.judged))
    assert repr(read).endswith(", cannot be judged 1)")


def test_they_are_left_out_of_differences_unless_there_are_no_others():
    base = EvalResult("base", "t", [item("a", 0.0), item("b", 0.0, judged=False), item("c", 1.0)])
    spd = EvalResult("spd", "t", [item("a", 1.0), item("b", 0.0, judged=False), item("c", 0.0, judged=False)])
    assert spd.paired_scores(base) == ([0.0], [1.0])
    assert (spd.accuracy_gain(base).value, spd.accuracy_gain(base).n) == (1.0, 1)
    none = EvalResult("none", "t", [item("a", 0.0, judged=False)])
    assert (none.accuracy.value, none.accuracy.n, none.accuracy_gain(none).value) == (0.0, 1, 0.0)


def test_shares_and_lengths():
    result = EvalResult("p", "t", [item("a", n_tokens=1), item("b", n_tokens=5, finish_reason="length")])
    assert (result.truncated.value, result.mean_length.value) == (0.5, 3.0)


def test_gain_is_paired_by_id_and_not_by_place():
    base = EvalResult("base", "t", [item(str(i), float(i % 2)) for i in range(20)])
    spd = EvalResult("spd", "t", [item(str(i), 1.0) for i in reversed(range(20))])
    gain = spd.accuracy_gain(base)
    assert gain.value == 0.5
    assert gain.low > 0
    same = EvalResult("spd", "t", base.items[::-1]).accuracy_gain(base)
    assert (same.value, same.low < 0 < same.high) == (0.0, True)
    assert "all differences equal" in same.method  # by place, half of the items would differ


def test_gain_over_other_items_is_refused():
    with refused("spd", "base", "different items"):
        EvalResult("spd", "t", [item("a")]).accuracy_gain(EvalResult("base", "t", [item("b")]))


def test_results_are_plain_json(tmp_path, tiny_pair, subspace):
    record = json.loads(scored(tiny_pair, subspace=subspace).save(tmp_path / "r.json").read_text())
    assert record["settings"]["model"] == tiny_pair.name
    assert len(record["items"]) == N
