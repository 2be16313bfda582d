"""The outcomes side by side: losses on parts of a gold completion, the answer alone, and what is kept of them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from spd_lens import tasks
from spd_lens.evaluation.evaluate import evaluate
from spd_lens.evaluation.outcomes import OUTCOMES, SAYS, fitting, other_texts, with_answer_only
from spd_lens.evaluation.results import EvalResult, ItemResult
from spd_lens.evaluation.teacher_forced import ForcedItem, per_item, teacher_forced
from spd_lens.examples import Example
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.policy import Policy
from tests.helpers import EXAMPLES, norms_in_full_precision

PARTS = ("results_loss", "copies_loss", "rest_loss")
SOLUTION = "12 + 30 = 42 apples, and 42 / 2 = 21 each.\n#### 21"
MARKED = Example(
    "Tom has 12 apples, buys 30 and shares.", SOLUTION, [(len(SOLUTION) - 2, len(SOLUTION))], "both",
    marks={"results": [(10, 12), (34, 36)], "copies": [(len(SOLUTION) - 2, len(SOLUTION))]},
)  # fmt: skip
ITEMS = [MARKED, *EXAMPLES, Example("7 * 3", "21", [(0, 2)], "computed", marks={"results": [(0, 2)]})]


@pytest.fixture(scope="module")
def policies(tiny_pair):
    subspace = extract(tiny_pair, EXAMPLES, layers="all", engine="twin", progress=False).subspace(2)
    return [Policy("base"), Policy("projected", subspace)]


def measured(pair, items, policies):
    return teacher_forced(pair, items, policies, progress=False)


def token_losses(hf, pair, example):
    """`(low, high, -log p)` of every token of the completion, with its characters there: one row in float64."""
    joint, text = pair.format.joint(example), len(example.completion)
    with torch.no_grad(), norms_in_full_precision():
        log_p = hf(torch.tensor([joint.ids]), use_cache=False).logits[0].log_softmax(-1)
    start = len(joint.text) - text
    return [
        (low - start, high - start, -log_p[t - 1, joint.ids[t]].item())
        for t, (low, high) in enumerate(joint.offsets) if high > start and high > low
    ]  # fmt: skip


def mean_over(losses, ranges, *, inside=True):
    """Mean over the tokens that overlap some of the ranges, or none of them; None without such tokens."""
    own = [loss for low, high, loss in losses if any(low < end and high > begin for begin, end in ranges) == inside]
    return sum(own) / len(own) if own else None


def test_parts_of_a_completion_have_their_own_loss(tiny_pair, policies):
    found = measured(tiny_pair, ITEMS, policies)
    hf = copy.deepcopy(tiny_pair.hf).double()
    for item, mine in zip(ITEMS, found["base"], strict=True):
        losses, marks = token_losses(hf, tiny_pair, item), item.marks
        assert mine.completion_loss == pytest.approx(mean_over(losses, [(0, 10**6)]), rel=1e-4)
        expected = [mean_over(losses, marks.get(name, ())) for name in ("results", "copies")]
        both = [span for spans in marks.values() for span in spans]
        expected.append(mean_over(losses, both, inside=False) if both else None)
        for name, value in zip(PARTS, expected, strict=True):
            assert getattr(mine, name) == (value and pytest.approx(value, rel=1e-4)), (item.id, name)
    both, computed = found["base"][0], found["base"][-1]
    assert len({both.results_loss, both.copies_loss, both.rest_loss, both.completion_loss}) == 4
    assert both.copies_loss == both.aligned_loss
    assert (computed.results_loss, computed.copies_loss, computed.rest_loss) == (computed.aligned_loss, None, None)
    projected = found["projected"][0]
    assert all(abs(getattr(projected, name) - getattr(both, name)) > 1e-3 for name in PARTS)


def test_marks_change_nothing_else(tiny_pair, policies):
    plain = measured(tiny_pair, [replace(item, marks={}) for item in ITEMS], policies)
    found = measured(tiny_pair, ITEMS, policies)
    for name, items in found.items():
        assert [replace(item, **dict.fromkeys(PARTS)) for item in items] == plain[name]


def test_the_answer_alone_is_asked_for_in_a_second_pass(tiny_pair, policies):
    task = tasks.get("synthetic-math")
    items = task.test(4, 42)
    found = measured(tiny_pair, items, policies)
    filled = with_answer_only(tiny_pair, task, items, policies, found, progress=False)
    assert [item.answer_only_loss for item in found["base"]] == [None] * 4  # what was given stays as it is
    hf = copy.deepcopy(tiny_pair.hf).double()
    for item, mine, before in zip(items, filled["base"], found["base"], strict=True):
        form = task.answer_only(item)
        losses = token_losses(hf, tiny_pair, form)
        assert mine.answer_only_loss == pytest.approx(mean_over(losses, form.spans), rel=1e-4)
        assert replace(mine, answer_only_loss=None) == before
        assert mine.answer_only_loss != mine.aligned_loss
    assert per_item({"": filled["base"]}, "answer_only_loss") != per_item({"": filled["projected"]}, "answer_only_loss")


def test_policies_that_are_not_measured_now_stay_as_they_are(tiny_pair, policies):
    task = tasks.get("synthetic-math")
    items = task.test(2, 42)
    known = [ForcedItem(item.id, 1.0, 1.0, 0.0, 0.5, answer_only_loss=7.0) for item in items]
    found = measured(tiny_pair, items, policies[1:]) | {"known": known}
    filled = with_answer_only(tiny_pair, task, items, policies[1:], found, progress=False)
    assert filled["known"] == known and filled["projected"][0].answer_only_loss is not None


@pytest.mark.parametrize(("name", "options"), [("synthetic-math", {"span": "answer-only"}), ("synthetic-qa", {})])
def test_an_item_that_is_its_own_answer_is_not_measured_again(tiny_pair, policies, name, options):
    task = tasks.get(name, **options)
    items = task.test(3, 42)
    assert [task.answer_only(item) for item in items] == items
    found = measured(tiny_pair, items, policies)
    filled = with_answer_only(None, task, items, policies, found)  # no model, no pass
    for policy, before in found.items():
        assert [item.answer_only_loss for item in filled[policy]] == [item.aligned_loss for item in before]


def test_what_does_not_fit_or_has_no_such_form_has_no_loss(tiny_pair, policies, monkeypatch):
    task = tasks.get("synthetic-math")
    first, second, third = task.test(3, 42)
    forms = {first.id: None, second.id: replace(second, prompt="word " * 10**4), third.id: task.answer_only(third)}
    monkeypatch.setattr(type(task), "answer_only", lambda self, item: forms[item.id])
    items = [first, second, third]
    found = measured(tiny_pair, items, policies)
    filled = with_answer_only(tiny_pair, task, items, policies, found, progress=False)["base"]
    assert [item.answer_only_loss is None for item in filled] == [True, True, False]


def test_evaluate_has_all_outcomes_and_keeps_them(tiny_pair, tmp_path):
    task = tasks.get("synthetic-math", max_new_tokens=4)
    result = evaluate(tiny_pair, task, 4, progress=False)
    for outcome, heading in OUTCOMES.items():
        values = [getattr(item, outcome) for item in result.items if getattr(item, outcome) is not None]
        assert getattr(result, outcome).value == pytest.approx(sum(values) / len(values)), outcome
        assert heading in repr(result)
    assert EvalResult.load(result.save(tmp_path / "result.json")) == result


def test_items_without_parts_are_kept_as_before(tmp_path):
    item = ItemResult("1", "q", "g", "c", None, 1.0, 3, "eos", aligned_loss=0.5)
    path = EvalResult("spd", "own", [item]).save(tmp_path / "result.json")
    [kept] = json.loads(path.read_text())["items"]
    assert kept["answer"] is None and kept["kl"] is None and not {*PARTS, "answer_only_loss"} & set(kept)
    assert EvalResult.load(path).items == [item] and EvalResult.load(path).results_loss is None
    assert set(ForcedItem("1", 1.0, 1.0, 0.0, 1.0).to_dict()) == {
        "id", "aligned_loss", "completion_loss", "kl", "token_accuracy"
    }  # fmt: skip


def test_items_that_have_no_value_are_left_out_of_a_group():
    one, two = (ForcedItem(id, 1.0, 1.0, 0.0, 1.0, results_loss=loss) for id, loss in (("a", None), ("b", 2.0)))
    assert per_item({"p": [one, two], "q": [one, replace(two, results_loss=4.0)]}, "results_loss") == [3.0]


def test_every_outcome_is_a_field_and_says_what_it_is():
    assert list(OUTCOMES) == list(SAYS)
    assert set(OUTCOMES) == {name for name in ForcedItem.__dataclass_fields__ if name != "id"}
    assert set(OUTCOMES) <= set(ItemResult.__dataclass_fields__)
    assert len(set(OUTCOMES.values())) == len(OUTCOMES) and all(says.endswith(".") for says in SAYS.values())


def test_other_texts_that_fit(tiny_pair):
    assert other_texts(3) == other_texts()[:3]
    long = Example("word " * 10**4, "text", ((0, 4),), "long")
    assert fitting(tiny_pair, [long, MARKED]) == [MARKED]
