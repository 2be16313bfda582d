"""Multiple choice by likelihood: the choice whose tokens are most probable, one variant at a time in float64."""

import copy

import pytest
import torch

import spd_lens as spd
from spd_lens.evaluation.choices import most_likely
from spd_lens.evaluation.evaluate import evaluate
from spd_lens.examples import Example
from spd_lens.subspaces.policy import Policy
from tests.helpers import norms_in_full_precision


@pytest.fixture(scope="module", params=["letter", "line"])
def task(request):
    return spd.tasks.get("synthetic-qa", span=request.param, max_new_tokens=4)


@pytest.fixture(scope="module")
def subspace(tiny_pair):
    examples = spd.tasks.get("synthetic-qa").calibration(6)
    return spd.extract(tiny_pair, examples, engine="twin", progress=False).subspace(0.5)


def reference(pair, model, items, task):
    """For each item and choice the log-probability of the span's tokens, by the definition."""
    wide, chosen = copy.deepcopy(model).double(), {}
    for item in items:
        scores = {}
        for choice in task.choices(item):
            ((start, end),) = item.spans
            text = item.completion[:start] + choice + item.completion[end:]
            encoded = pair.encode(Example(item.prompt, text, ((start, start + len(choice)),)))
            with torch.no_grad(), norms_in_full_precision():
                log_p = wide(torch.tensor([encoded.ids]), use_cache=False).logits[0].log_softmax(-1)
            scores[choice] = sum(log_p[t - 1, encoded.ids[t]].item() for t in encoded.scored)
        chosen[item.id] = max(scores, key=scores.get)
    return chosen


@pytest.mark.parametrize("projects", [False, True])
def test_the_most_probable_choice_is_taken(any_tiny_pair, subspace, tiny_pair, task, projects):
    pair, items = (tiny_pair if projects else any_tiny_pair), task.test(12)
    policy = Policy("p", subspace if projects else None)
    choices = {item.id: task.choices(item) for item in items}
    found = most_likely(pair, items, choices, policy, progress=False)
    with policy.applied(pair) as model:
        assert found == reference(pair, model, items, task)
    assert len(set(found.values())) > 1  # or any constant would pass
    assert found == most_likely(pair, items, choices, policy, batch_tokens=1, progress=False)


def test_evaluation_keeps_the_choice_and_its_verdict(tiny_pair, subspace, task):
    result = evaluate(tiny_pair, task, 12, subspace, progress=False)
    items = {item.id: item for item in task.test(12)}
    choices = {id: task.choices(item) for id, item in items.items()}
    found = most_likely(tiny_pair, list(items.values()), choices, Policy("p", subspace), progress=False)
    right = [found[id] == item.completion[slice(*item.spans[0])] for id, item in items.items()]
    assert {item.id: item.choice for item in result.items} == found
    assert [item.choice_score for item in result.items] == [float(x) for x in right]
    assert result.choice_accuracy.value == sum(right) / 12
    assert "accuracy by likelihood" in repr(result)


def test_other_tasks_have_none(tiny_pair):
    result = evaluate(tiny_pair, spd.tasks.get("synthetic-math", max_new_tokens=4), 2, progress=False)
    assert result.choice_accuracy is None
    assert result.items[0].choice is None
