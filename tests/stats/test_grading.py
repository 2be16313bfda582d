"""Every level of the grade, reached and just missed, on findings that differ in one respect."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import permutation_test

from spd_lens.errors import SPDError
from spd_lens.stats import Estimate, Finding, Grade, Level, corrected, grade
from tests.helpers import refused

OWN, OTHER = "a" * 16, "b" * 16
GAIN = Estimate(-0.2, -0.3, -0.1, 100, "bootstrap")
NOTHING = Estimate(-0.2, -0.5, 0.1, 100, "bootstrap")
HARM = Estimate(0.2, 0.1, 0.3, 100, "bootstrap")


def finding(**changes: Any) -> Finding:
    """A loss that fell on held-out items, against the base."""
    fields: dict[str, Any] = {
        "kind": "subspace", "digest": OWN, "method": "spd", "outcome": "results_loss", "task": "gsm8k",
        "data": "held-out", "against": "base", "difference": GAIN, "model": "one", "fingerprint": "1" * 16,
        "sources": {"effects/gsm8k.json": "0" * 64}, "kl": 0.1, "kl_against": 0.0, "p": 0.01,
        "correction": "Holm over 4", "seed": 1,
    }  # fmt: skip
    return Finding(**{**fields, **changes})


def beats(**changes: Any) -> Finding:
    """The same against random directions that did as much damage."""
    return finding(**{"against": "random", "kl_against": 0.105, **changes})


def replicated(which: str = "1", n: int = 3, **changes: Any) -> list[Finding]:
    """One model with several seeds, each of which made another subspace that is better than the base and than random.

    `changes` are those of the comparison with random.
    """
    own = {"fingerprint": which * 16, "model": f"model {which}"}
    found: list[Finding] = []
    for seed in range(1, n + 1):
        digest = OWN if which == "1" and seed == 1 else f"{which}{seed}" * 8
        mine = {"digest": changes.get("digest", digest), "seed": seed, **own}
        found += [finding(**mine), beats(**{**mine, **changes})]
    return found


def level(*findings: Finding) -> Level:
    return grade(findings, OWN).level


def test_without_findings_there_is_no_evidence() -> None:
    assert grade([], OWN) == Grade(Level.NONE, ("nothing was measured on it",))
    assert str(grade([])) == "none"


def test_findings_of_another_digest_do_not_count() -> None:
    assert level(finding(digest=OTHER), *replicated(digest=OTHER)) == Level.NONE
    assert grade([finding(digest=OTHER)]).level == Level.HELD_OUT


def test_seen_in_calibration() -> None:
    assert level(finding(data="calibration")) == Level.CALIBRATION
    assert level(finding(data="calibration", difference=NOTHING)) == Level.NONE
    assert level(finding(data="calibration", against="random")) == Level.NONE


@pytest.mark.parametrize(
    "changes",
    [
        {"difference": NOTHING}, {"difference": HARM}, {"against": "paper"}, {"p": 0.05}, {"outcome": "accuracy"},
        {"difference": Estimate(-0.2, -math.inf, math.inf, 1, "one value, no interval")},
    ],
)  # fmt: skip
def test_held_out_takes_a_clear_difference_for_the_better_from_the_base(changes: dict[str, Any]) -> None:
    assert level(finding()) == Level.HELD_OUT
    assert level(finding(p=None, correction="")) == Level.HELD_OUT
    assert level(finding(outcome="accuracy", difference=HARM)) == Level.HELD_OUT  # 0.2 more of it, which is a gain
    assert level(finding(**changes)) == Level.NONE


def test_held_out_is_lost_where_another_measurement_of_the_same_is_clear_for_the_worse() -> None:
    assert level(finding(), finding(seed=2, difference=HARM)) == Level.NONE
    assert level(finding(), finding(seed=2, difference=NOTHING)) == Level.HELD_OUT
    assert level(finding(), finding(task="svamp", difference=HARM)) == Level.HELD_OUT


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_against": 0.112}, {"kl_against": 0.089}, {"kl_against": None}, {"kl": None}, {"kl": 0.0},
        {"difference": NOTHING}, {"p": 0.05}, {"p": None}, {"correction": ""}, {"data": "calibration"},
        {"against": "paper"}, {"digest": OTHER}, {"outcome": "aligned_loss"}, {"task": "svamp"}, {"kind": "adapter"},
        {"method": "ssd"},
    ],
)  # fmt: skip
def test_beating_random_takes_equal_damage_and_a_correction(changes: dict[str, Any]) -> None:
    assert level(finding(), beats()) == Level.BEATS_RANDOM
    assert level(finding(), beats(kl_against=0.111)) == Level.BEATS_RANDOM
    assert level(finding(), beats(kl_against=0.0901)) == Level.BEATS_RANDOM
    assert level(finding(), beats(**changes)) == Level.HELD_OUT


def test_beating_random_is_not_enough_where_nothing_is_better_than_the_base() -> None:
    assert level(beats()) == Level.NONE
    assert level(beats(), finding(difference=NOTHING)) == Level.NONE


def test_beating_random_is_lost_to_a_clear_defeat_on_the_same_question() -> None:
    assert level(finding(), beats(), beats(seed=2, difference=HARM)) == Level.HELD_OUT


def test_one_subspace_that_is_measured_with_several_seeds_is_no_replication() -> None:
    again = [one for seed in (1, 2, 3) for one in (finding(seed=seed), beats(seed=seed))]
    assert level(*again) == Level.BEATS_RANDOM


def test_replications_must_be_better_than_the_base_too() -> None:
    mine, others = replicated()[:2], [one for one in replicated()[2:] if one.against == "random"]
    assert level(*mine, *others) == Level.BEATS_RANDOM
    worse = [replace(one, against="base", difference=HARM) for one in others]
    assert level(*mine, *others, *worse) == Level.BEATS_RANDOM
    here = {"fingerprint": "1" * 16, "model": "model 1"}
    better = [finding(digest=one.digest, seed=one.seed, **here) for one in others]
    assert level(*mine, *others, *better) == Level.SEEDS


def test_a_methods_grade_is_not_pieced_together_from_several_artefacts() -> None:
    a = [finding(), beats(difference=NOTHING)]
    b = [finding(digest=OTHER, difference=NOTHING), beats(digest=OTHER)]
    assert grade([*a, *b], OWN).level == Level.HELD_OUT and grade([*a, *b], OTHER).level == Level.NONE
    assert grade([*a, *b]).level == Level.HELD_OUT


def test_replicated_over_seeds() -> None:
    assert level(finding(), *replicated(n=3)) == Level.SEEDS
    assert level(finding(), *replicated(n=2)) == Level.BEATS_RANDOM
    assert level(finding(), *[beats(seed=1, digest=digest * 16) for digest in "abcd"]) == Level.BEATS_RANDOM
    assert level(finding(), *[beats(seed=None) for _ in range(4)]) == Level.BEATS_RANDOM
    one_more = beats(digest=OTHER, seed=4, difference=Estimate(0.01, -0.1, 0.12, 100, ""))
    assert level(finding(), *replicated(), one_more) == Level.BEATS_RANDOM


@pytest.mark.parametrize("changes", [{"method": "ssd"}, {"task": "svamp"}, {"kind": "adapter"}, {"kl_against": 0.2}])
def test_a_replication_is_of_the_same_method_and_question_at_equal_damage(changes: dict[str, Any]) -> None:
    assert level(finding(), beats(), *replicated(digest=OTHER, **changes)) == Level.BEATS_RANDOM


def test_replicated_over_models() -> None:
    own = [finding(model="model 1"), *replicated("1")]
    assert level(*own, *replicated("2")) == Level.MODELS
    assert level(*own, *replicated("2", n=2)) == Level.SEEDS
    assert level(*own, *replicated("2", model="model 1")) == Level.SEEDS
    against = beats(fingerprint="3" * 16, digest=OTHER, difference=NOTHING)
    assert level(*own, *replicated("2"), replace(against, difference=HARM)) == Level.SEEDS
    assert level(*own, *replicated("2"), against) == Level.MODELS
    elsewhere = [finding(model="model 1"), beats(), *replicated("2"), *replicated("3")]
    assert level(*elsewhere) == Level.BEATS_RANDOM  # its own model has to be among them


def test_the_grade_is_that_of_the_best_question_and_says_what_carried_it() -> None:
    found = grade([finding(task="svamp", difference=NOTHING), finding(), beats()], OWN)
    assert str(found) == "beats random at equal damage"
    assert len(found.reasons) == 2
    assert "results_loss on gsm8k (held-out) against random: -0.20 [-0.30, -0.10] (n=100)" in found.reasons[1]
    assert "KL 0.1 against 0.105, p 0.01 (Holm over 4), seed 1, one, from effects/gsm8k.json" in found.sentence


def test_a_finding_survives_json() -> None:
    for one in (finding(), beats(seed=None, p=None, difference=Estimate(0.5, -math.inf, math.inf, 1, ""))):
        assert Finding.from_dict(json.loads(json.dumps(one.to_dict()))) == one


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "model"), ("digest", "xyz"), ("digest", 7), ("outcome", "kl"), ("outcome", []), ("data", "test"),
        ("fingerprint", "1"), ("p", 1.5), ("p", "0.01"), ("kl", -0.1), ("kl", math.nan), ("seed", "1"), ("seed", True),
        ("sources", {}), ("sources", {"../run/a.json": "0" * 64}), ("sources", {"/etc/passwd": "0" * 64}),
        ("sources", {"a.json": "short"}), ("sources", ["a.json"]), ("model", "\x1b[2J"), ("task", None),
        ("difference", {"value": 3.0, "low": 0.0, "high": 1.0, "n": 3, "method": ""}), ("difference", {"value": 0.5}),
        ("difference", {"value": 0.5, "low": 0.0, "high": 1.0, "n": 0, "method": ""}), ("difference", 0.5),
        ("grade", "replicated over models"), ("level", 5),
    ],
)  # fmt: skip
def test_a_record_that_no_measurement_gives_is_refused_in_one_sentence(field: str, value: object) -> None:
    with refused("finding"):
        Finding.from_dict({**finding().to_dict(), field: value})


@pytest.mark.parametrize("record", [None, [], "finding", {}, 3])
def test_what_is_no_record_is_refused(record: object) -> None:
    with refused("a finding cannot be read", "measure again"):
        Finding.from_dict(record)


def test_a_paired_finding_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=12)
    after = before - 0.1 + rng.normal(scale=0.2, size=12)
    about = {key: value for key, value in vars(finding()).items() if key not in ("difference", "p", "correction")}
    found = Finding.paired(before.tolist(), after.tolist(), **about)
    assert found.difference.value == pytest.approx(float(np.mean(after - before)), abs=1e-12)
    exact = permutation_test((after - before,), np.mean, permutation_type="samples", n_resamples=math.inf)
    assert found.p == pytest.approx(exact.pvalue, abs=1e-12)
    assert found.correction == ""


def test_the_correction_is_over_what_is_claimed_against_random_and_apart_from_it_over_the_base() -> None:
    given = [
        beats(p=0.01), beats(p=0.03), beats(p=0.02), beats(p=0.001, kl_against=0.5), finding(p=0.04), finding(p=0.01),
        beats(against="paper", p=0.5),
    ]  # fmt: skip
    found = corrected(replace(one, correction="") for one in given)
    assert [one.p for one in found] == pytest.approx([0.03, 0.04, 0.04, 0.001, 0.04, 0.02, 0.5])
    assert [one.correction for one in found] == ["Holm over 3"] * 3 + [""] + ["Holm over 2"] * 2 + [""]


def test_a_grade_is_given_in_no_other_way() -> None:
    with pytest.raises(AttributeError):
        grade([finding()]).level = Level.MODELS  # type: ignore[misc]
    with pytest.raises((TypeError, SPDError)):
        Finding(**{**vars(finding()), "grade": Level.MODELS})  # type: ignore[arg-type]
