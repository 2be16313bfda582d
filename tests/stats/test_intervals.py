"""Statistics against independent references: the literature, enumeration, simulation."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from spd_lens.errors import SPDError
from spd_lens.stats import intervals as statistics
from spd_lens.stats.estimate import Estimate
from spd_lens.stats.intervals import (
    clustered_difference,
    clustered_mean,
    difference_sentence,
    mcnemar_exact,
    mean_interval,
    paired_difference,
    score_interval,
    seed_summary,
    wilson,
    within_noise,
)


def covered(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


# --- one model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_newcombes_method_3(successes, n, low, high):
    """Newcombe (1998), Statistics in Medicine 17:857-872, table I, method 3."""
    estimate = wilson(successes, n)
    assert estimate.low == pytest.approx(low, abs=5e-5)
    assert estimate.high == pytest.approx(high, abs=5e-5)
    assert (estimate.value, estimate.n) == (successes / n, n)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilson_agrees_with_scipy(confidence):
    for successes in range(18):
        reference = binomtest(successes, 17).proportion_ci(confidence, method="wilson")
        estimate = wilson(successes, 17, confidence=confidence)
        assert (estimate.low, estimate.high) == pytest.approx((reference.low, reference.high))
        assert estimate.low <= estimate.value <= estimate.high


def test_score_interval_picks_the_method_by_the_scores():
    assert score_interval([1, 0, True, False, 1.0]) == wilson(3, 5)
    fractional = score_interval(np.linspace(0, 1, 40))
    assert fractional.method == "BCa bootstrap 95%"
    assert 0 < fractional.low < 0.5 < fractional.high < 1
    few = score_interval([0.5, 0.25])
    assert "conservative" in few.method
    constant = score_interval([0.5] * 30)
    assert constant.low < 0.4 and constant.high > 0.6  # never a certainty


def test_bca_agrees_with_the_exact_bootstrap_distribution():
    """For whole numbers the bootstrap distribution of the sum is an n-fold convolution: no resampling needed."""
    values = np.array([0, 0, 1, 1, 2, 2, 3, 4, 5, 7, 9, 14])
    n = values.size
    one = np.bincount(values) / n
    distribution = np.ones(1)
    for _ in range(n):
        distribution = np.convolve(distribution, one)
    below = distribution[: values.sum()].sum() + distribution[values.sum()] / 2
    z0 = norm.ppf(below)
    deviation = values - values.mean()
    acceleration = (deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5)
    ends = []
    for q in (0.025, 0.975):
        z = z0 + norm.ppf(q)
        level = norm.cdf(z0 + z / (1 - acceleration * z))
        ends.append(np.searchsorted(distribution.cumsum(), level) / n)
    estimate = mean_interval(values, n_resamples=99_999)
    assert (estimate.low, estimate.high) == pytest.approx(ends, abs=1.5 / n)
    percentile = [np.searchsorted(distribution.cumsum(), q) / n for q in (0.025, 0.975)]
    assert percentile[1] < ends[1] - 2 / n  # the skew matters: the plain percentile interval would fail this test


def test_mean_interval_is_reproducible_and_seeded():
    values = np.random.default_rng(3).exponential(size=50)
    assert mean_interval(values, seed=1) == mean_interval(list(values), seed=1)
    assert mean_interval(values, seed=1) != mean_interval(values, seed=2)
    narrow, wide = mean_interval(values, confidence=0.8), mean_interval(values, confidence=0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_mean_interval_covers_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.normal(2.0, 1.0, size=(400, 40))
    hits = sum(covered(mean_interval(s, n_resamples=999), 2.0) for s in samples)
    assert 0.91 <= hits / 400 <= 0.98
    hits = sum(covered(mean_interval(s, n_resamples=999, confidence=0.8), 2.0) for s in samples)
    assert 0.74 <= hits / 400 <= 0.86


def test_few_values_get_t_because_the_bootstrap_would_be_too_short(monkeypatch):
    samples = np.random.default_rng(1).normal(size=(400, 5))
    assert "Student's t" in mean_interval(samples[0]).method
    assert sum(covered(mean_interval(s), 0.0) for s in samples) / 400 >= 0.93
    monkeypatch.setattr(statistics, "MIN_BOOTSTRAP", 2)
    assert sum(covered(mean_interval(s, n_resamples=999), 0.0) for s in samples) / 400 < 0.88


def test_degenerate_samples_say_so():
    one = mean_interval([3.0])
    assert not one.bounded and "no interval" in one.method and str(one) == "3.00 [no interval] (n=1)"
    constant = mean_interval([0.1] * 7)
    assert (constant.value, constant.low, constant.high) == (0.1, 0.1, 0.1) and "constant" in constant.method


def test_an_undefined_bca_falls_back_on_percentiles(monkeypatch):
    real = statistics.stats.bootstrap

    def undefined(*args, method, **kwargs):
        result = real(*args, method=method, **kwargs)
        if method == "BCa":
            result.confidence_interval = type(result.confidence_interval)(math.nan, math.nan)
        return result

    monkeypatch.setattr(statistics.stats, "bootstrap", undefined)
    estimate = mean_interval(np.arange(20))
    assert estimate.bounded and "percentile" in estimate.method


# --- two models ------------------------------------------------------------------------------------------------------


def test_mcnemar_by_enumerating_every_way_to_break_the_ties():
    """p = share of the 2^m assignments of the disagreements that are at least as lopsided."""
    for only_a, only_b in itertools.product(range(6), range(7)):
        a = [1] * only_a + [0] * only_b + [1, 1, 0]
        b = [0] * only_a + [1] * only_b + [1, 1, 0]
        m = only_a + only_b
        lopsided = [abs(2 * sum(w) - m) >= abs(only_a - only_b) for w in itertools.product((0, 1), repeat=m)]
        result = mcnemar_exact(a, b)
        assert result.p_value == pytest.approx(np.mean(lopsided))
        assert (result.n_only_a, result.n_only_b) == (only_a, only_b)
        assert mcnemar_exact(b, a) == (result.p_value, only_b, only_a)


def test_paired_difference_has_the_sign_of_b_and_uses_the_pairing():
    rng = np.random.default_rng(4)
    item = rng.normal(0, 5, size=60)  # items differ far more than models
    a, b = item + rng.normal(0, 0.1, 60), item + 0.3 + rng.normal(0, 0.1, 60)
    estimate = paired_difference(a, b)
    assert covered(estimate, 0.3) and estimate.high - estimate.low < 0.12 and "paired" in estimate.method
    assert paired_difference(b, a).value == pytest.approx(-estimate.value)
    assert not within_noise(estimate)
    shuffled = paired_difference(a, rng.permutation(b))  # the same scores without their pairing lose it
    assert within_noise(shuffled)


def test_planted_null_stays_quiet_and_planted_effect_is_caught():
    rng = np.random.default_rng(5)

    names = {"first": "base", "second": "SPD"}

    def compare(won_share: float) -> str:
        a = rng.random(150) < 0.4
        b = np.where(a, rng.random(150) >= 0.1, rng.random(150) < won_share)  # loses a tenth of what base had right
        return difference_sentence(paired_difference(a, b), measure="accuracy", test=mcnemar_exact(a, b), **names)

    null = [compare(0.4 * 0.1 / 0.6) for _ in range(200)]  # wins as many as it loses
    assert sum("within noise" not in sentence for sentence in null) <= 0.08 * 200
    planted = [compare(0.35) for _ in range(200)]
    assert sum("SPD is higher" in sentence for sentence in planted) >= 0.95 * 200
    measured = [paired_difference(*rng.normal(size=(2, 60))) for _ in range(200)]
    assert 1 <= sum(not within_noise(estimate) for estimate in measured) <= 0.09 * 200


def test_agreement_on_few_items_is_not_certainty():
    same = paired_difference([1, 1, 0] * 4, [1, 1, 0] * 4)
    assert same.value == 0 and same.low < -0.2 and same.high > 0.2
    always = paired_difference([0] * 50, [1] * 50)
    assert always.value == 1 and 0.8 < always.low < 0.95 and always.high == 1
    assert covered(paired_difference([1] * 50, [0] * 50), -1)
    assert within_noise(paired_difference([0, 0], [1, 1]))
    exact = paired_difference([0.25] * 12, [0.25] * 12)  # measures without a known range
    assert (exact.low, exact.high) == (0, 0) and within_noise(exact)


def test_difference_sentence_needs_both_interval_and_test():
    names = {"measure": "accuracy", "first": "base", "second": "SPD"}
    a, b = [0] * 4 + [1] * 96, [1] * 100  # four disagreements, all one way: p = 0.125
    difference, test = paired_difference(a, b), mcnemar_exact(a, b)
    assert not within_noise(difference)
    assert difference_sentence(difference, **names).endswith("; SPD is higher.")
    sentence = difference_sentence(difference, test=test, **names)
    assert sentence.endswith("; within noise.") and "exact McNemar p = 0.12 (only base 0, only SPD 4)" in sentence
    assert str(difference) in sentence and sentence.startswith("accuracy, SPD minus base: ")
    assert difference_sentence(Estimate(-0.2, -0.3, -0.1, 90, ""), **names).endswith("SPD is lower.")
    assert difference_sentence(mean_interval([0.5]), **names).endswith("too few items to say.")


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_seed_summary_is_students_t():
    """Student's own data (1908), the extra sleep by optical isomers: mean 1.58, sd 1.23, n = 10."""
    extra = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    summary = seed_summary(dict(enumerate(extra)))
    assert summary.estimate.value == pytest.approx(1.58)
    assert summary.sd == pytest.approx(1.2300, abs=1e-4)
    half_width = 2.262157 * 1.2300 / math.sqrt(10)  # t table, 9 degrees of freedom
    assert summary.estimate.high - 1.58 == pytest.approx(half_width, abs=1e-4)
    assert 1.58 - summary.estimate.low == pytest.approx(half_width, abs=1e-4)
    assert summary.estimate.n == 10
    assert seed_summary(extra) == summary
    assert "sd unknown" in str(seed_summary([0.4])) and not seed_summary([0.4]).estimate.bounded


def test_clusters_by_item_cover_where_pooling_does_not():
    rng = np.random.default_rng(6)
    clustered = pooled = 0
    for _ in range(300):
        items = rng.normal(0, 1, size=40)
        scores = items + rng.normal(0, 0.3, size=(5, 40))
        clustered += covered(clustered_mean(scores, n_resamples=999), 0.0)
        pooled += covered(mean_interval(scores.ravel(), n_resamples=999), 0.0)
    assert clustered / 300 >= 0.91
    assert pooled / 300 < 0.75


def test_clustered_forms_agree_and_count_items():
    table = np.random.default_rng(7).random((3, 20))
    by_name = {f"s{i}": {f"q{j}": v for j, v in reversed(list(enumerate(row)))} for i, row in enumerate(table)}
    estimate = clustered_mean(table)
    assert estimate.n == 20 and estimate.value == pytest.approx(table.mean()) and "3 seed(s)" in estimate.method
    assert clustered_mean(by_name).value == pytest.approx(estimate.value)
    other = {"s9": {f"q{j}": v + 1 + 0.1 * j for j, v in enumerate(table.mean(axis=0))}}
    difference = clustered_difference(by_name, other)  # other order of items, other seeds
    assert difference.value == pytest.approx(1 + 0.1 * 9.5) and not within_noise(difference)
    assert within_noise(clustered_difference(table, table[::-1] + np.random.default_rng(8).normal(0, 1, 20)))


def test_clustered_certainty_is_not_claimed():
    assert clustered_mean([[1] * 8, [1] * 8]).low == wilson(8, 8).low
    assert clustered_difference([[1] * 8], [[1] * 8, [1] * 8]).low < -0.2


# --- shape and bad input ---------------------------------------------------------------------------------------------


def test_estimates_print_and_save():
    assert str(Estimate(0.42, 0.33, 0.51, 100, "x")) == "0.42 [0.33, 0.51] (n=100)"
    assert str(Estimate(0.00123, 0.00101, 0.00141, 24, "x")) == "0.00123 [0.00101, 0.00141] (n=24)"
    assert str(Estimate(-0.0001, -0.3, 0.3, 9, "x")) == "0.00 [-0.30, 0.30] (n=9)"
    assert str(Estimate(1234.5, 1000.0, 1500.0, 9, "x")) == "1234.50 [1000.00, 1500.00] (n=9)"
    assert json.loads(json.dumps(mean_interval([1.0]).to_dict(), allow_nan=False))["low"] is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson(5, 0), "n is 0"),
        (lambda: wilson(5, 4), "between 0 and n = 4"),
        (lambda: wilson(math.nan, 4), "between 0 and n"),
        (lambda: wilson(1, 2.5), "whole number"),
        (lambda: wilson(1, 4, confidence=95), "confidence"),
        (lambda: score_interval([0.2, 1.2]), r"\[0, 1\], but one is 1.2"),
        (lambda: mean_interval([]), "at least one"),
        (lambda: mean_interval([1.0, math.nan]), "number 1 is nan"),
        (lambda: mean_interval([math.inf]), "number 0 is inf"),
        (lambda: mean_interval(["a"]), "must be numbers"),
        (lambda: mean_interval([[1.0], [2.0]]), "shape"),
        (lambda: mean_interval([1.0, 2.0], n_resamples=0), "resamples"),
        (lambda: mean_interval(range(20), confidence=1.0), "confidence"),
        (lambda: paired_difference([1, 0], [1]), "2 scores and b has 1"),
        (lambda: mcnemar_exact([1, 0.5], [1, 0]), "a holds 0.5"),
        (lambda: mcnemar_exact([1, 0], [1, 2]), "b holds 2"),
        (lambda: seed_summary({}), "at least one"),
        (lambda: clustered_mean([]), "no seed"),
        (lambda: clustered_mean([[1, 0], [1]]), "every seed needs all"),
        (lambda: clustered_mean({0: {"x": 1}, 1: {"y": 1}}), "'x'"),
        (lambda: clustered_difference({0: {"x": 1}}, {0: {"y": 1}}), "different items"),
        (lambda: clustered_difference([[1, 0]], [[1, 0, 1]]), "2 items and b has 3"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message):
    with pytest.raises(SPDError, match=message):
        call()
