"""Sign flips against enumeration by hand and McNemar; Holm against a worked example; error rates by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from spd_lens.errors import SPDError
from spd_lens.stats.corrections import holm, sign_flip
from spd_lens.stats.intervals import mcnemar_exact


def test_exact_for_few_items() -> None:
    values = [0.3, -0.1, 0.4, 0.2, 0.25]
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in itertools.product((-1, 1), repeat=5)
    ]
    expected = sum(total >= abs(sum(values)) - 1e-12 for total in sums) / 32
    assert sign_flip(values) == expected
    assert sign_flip([-v for v in values]) == expected  # two-sided


def test_items_that_do_not_differ_change_nothing() -> None:
    assert sign_flip([0.3, 0, -0.1, 0, 0.4, 0.2]) == sign_flip([0.3, -0.1, 0.4, 0.2])
    assert sign_flip([0.0, 0.0, 0.0]) == 1.0


def test_binary_scores_give_mcnemar() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(30) < 0.5, rng.random(30) < 0.55
    keep = np.flatnonzero(a != b)[:12]  # few enough disagreements to enumerate
    same = np.flatnonzero(a == b)
    index = np.concatenate([keep, same])
    a, b = a[index].astype(float), b[index].astype(float)
    assert sign_flip(b - a) == pytest.approx(mcnemar_exact(a, b).p_value, abs=1e-12)


def test_random_flips_agree_with_the_normal_approximation() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(0.15, 1, 200)
    z = values.sum() / np.sqrt((values**2).sum())
    assert sign_flip(values, n_flips=50_000) == pytest.approx(2 * stats.norm.sf(abs(z)), rel=0.1)


def test_seed_decides_and_p_is_never_zero() -> None:
    values = np.full(40, 1.0) + np.arange(40) / 100
    assert sign_flip(values, n_flips=999) == 1 / 1000
    noisy = np.random.default_rng(2).normal(0.2, 1, 40)
    assert sign_flip(noisy, seed=3) == sign_flip(noisy, seed=3)
    assert sign_flip(noisy, seed=3) != sign_flip(noisy, seed=4)


def test_batches_do_not_change_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = np.random.default_rng(2).normal(0.2, 1, 40)
    whole = sign_flip(noisy, n_flips=4000)
    monkeypatch.setattr("spd_lens.stats.corrections._BATCH", 40 * 160)  # whole bytes, so the same bits
    assert sign_flip(noisy, n_flips=4000) == whole


def test_false_positives_of_one_test_stay_at_the_level() -> None:
    rng = np.random.default_rng(3)
    # symmetric with heavy tails: an interval from a normal approximation would have more trouble than flips have
    p = [sign_flip(rng.standard_t(3, 20), n_flips=499, seed=i) for i in range(800)]
    hits = sum(value <= 0.05 for value in p)
    low, high = stats.binom.ppf([0.001, 0.999], 800, 0.05)
    assert low <= hits <= high


def test_power_is_that_of_the_t_test() -> None:
    rng = np.random.default_rng(4)
    samples = rng.normal(0.5, 1, (400, 32))
    mine = sum(sign_flip(row, n_flips=499, seed=i) <= 0.05 for i, row in enumerate(samples))
    reference = sum(stats.ttest_1samp(row, 0).pvalue <= 0.05 for row in samples)
    assert reference > 280  # about 78 % of 400
    assert abs(mine - reference) < 12


def test_family_of_tests_stays_at_its_level() -> None:
    """400 null studies of 5 methods that share a base, 9 differences each: about 5 % make any claim after Holm."""
    rng = np.random.default_rng(5)
    hits = raw = 0
    for i in range(400):
        scores = rng.normal(0, 1, (5, 16))
        pairs = [(0, 1), (0, 2), (0, 3), (0, 4), (4, 1), (4, 2), (4, 3), (1, 3), (2, 3)]
        p = [sign_flip(scores[b] - scores[a], n_flips=999, seed=i) for a, b in pairs]
        raw += min(p) <= 0.05
        hits += min(holm(p)) <= 0.05
    low, high = stats.binom.ppf([0.001, 0.999], 400, [0.01, 0.05])  # shared bases make Holm conservative
    assert low <= hits <= high
    assert raw > 2 * high  # what would have been claimed without it


def test_holm_by_hand() -> None:
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, then 0.04 raised to 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("values", [[], [0.1, float("nan")]])
def test_bad_differences(values: list[float]) -> None:
    with pytest.raises(SPDError, match="finite differences"):
        sign_flip(values)


def test_bad_settings() -> None:
    with pytest.raises(SPDError, match="99 flips, not 10"):
        sign_flip([0.1], n_flips=10)
    with pytest.raises(SPDError, match="between 0 and 1, but one is 1.2"):
        holm([0.1, 1.2])
