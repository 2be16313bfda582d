"""`Policy`: its names, what is no policy, and that functions do the same with one as with its parts."""

import pytest

from spd_lens.evaluation.evaluate import evaluate
from spd_lens.generation.generate import generate
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.policy import Policy
from spd_lens.tasks.registry import get
from tests.helpers import EXAMPLES, make_adapter, refused

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def parts(tiny_pair, tmp_path_factory):
    subspace = extract(tiny_pair, EXAMPLES, layers="all", engine="twin", **QUIET).subspace(2)
    adapter = make_adapter(tiny_pair.hf, tmp_path_factory.mktemp("adapter"), std=0.3)
    return {"subspace": subspace, "strength": 0.5, "adapter": adapter}


def test_a_policy_is_named_by_what_it_does(parts):
    own, adapter = parts["subspace"], parts["adapter"]
    policies = [Policy(), Policy(subspace=own), Policy(adapter=adapter), Policy(subspace=own, adapter=adapter)]
    assert [policy.name for policy in policies] == ["base", "projected", "tuned", "tuned+projected"]
    assert Policy("mine", own).name == "mine"


@pytest.mark.parametrize("strength", [-0.1, 1.1, True, "1", None, float("nan")])
def test_a_strength_that_is_none_is_refused_at_once(strength):
    with refused("strength", repr(strength)):
        Policy("p", None, strength)


def test_generate_takes_it_whole(tiny_pair, parts):
    options = {"max_new_tokens": 4, "temperature": 1.5, **QUIET}
    whole = generate(tiny_pair, ["a b", "c"], policy=Policy("mine", **parts), **options)
    single = generate(tiny_pair, ["a b", "c"], **parts, **options)
    assert (whole.records, whole.settings) == (single.records, single.settings)
    assert whole.records != generate(tiny_pair, ["a b", "c"], **options).records


def test_evaluate_takes_it_whole(tiny_pair, parts):
    task = get("synthetic-math", max_new_tokens=4)
    whole = evaluate(tiny_pair, task, 3, policy=Policy("mine", **parts), **QUIET)
    single = evaluate(tiny_pair, task, 3, **parts, name="mine", **QUIET)
    assert whole == single
    assert evaluate(tiny_pair, task, 3, policy=Policy("mine", **parts), name="other", **QUIET).policy == "other"


@pytest.mark.parametrize("name", ["subspace", "strength", "adapter"])
def test_a_policy_and_parts_of_another_are_refused(tiny_pair, parts, name):
    task = get("synthetic-math")
    for call in (
        lambda **given: generate(tiny_pair, ["a"], **given, **QUIET),
        lambda **given: evaluate(tiny_pair, task, 3, **given, **QUIET),
    ):
        with refused("'mine'", name, "leave those out"):
            call(policy=Policy("mine"), **{name: parts[name]})


def test_a_choice_by_prompt_beside_a_policy_is_refused(tiny_pair):
    with refused("'mine'", "subspace"):
        generate(tiny_pair, ["a"], policy=Policy("mine"), subspace={"0": None}, **QUIET)


def test_what_is_no_policy_is_refused(tiny_pair):
    with refused("'projected'", "must be a Policy"):
        generate(tiny_pair, ["a"], policy="projected", **QUIET)
