"""Differences over items and draws, on simulated data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from spd_lens.stats.contrasts import _shift, crossed_difference, crossed_differences
from tests.helpers import refused


def crossed(rng, n_draws, n_items, *, draw, item, cell, items=None):
    """Crossed random effects around 0, with these standard deviations."""
    items = item * rng.standard_normal(n_items) if items is None else items
    return draw * rng.standard_normal((n_draws, 1)) + items + cell * rng.standard_normal((n_draws, n_items))


def test_the_variance_is_the_sum_of_the_two_one_way_variances():
    rng = np.random.default_rng(0)
    own, reference = rng.standard_normal((3, 7)), rng.standard_normal((3, 7))
    found = crossed_difference(own, reference, paired=True)
    rows = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(own, reference, strict=True)]
    means = [sum(row) / 7 for row in rows]
    columns = [sum(column) / 3 for column in zip(*rows, strict=True)]
    middle = sum(means) / 3
    by_draw = sum((m - middle) ** 2 for m in means) / 2 / 3
    by_item = sum((c - middle) ** 2 for c in columns) / 6 / 7
    assert found.value == pytest.approx(middle)
    assert found.se == pytest.approx(math.sqrt(by_draw + by_item))
    assert found.df == pytest.approx((by_draw + by_item) ** 2 / (by_draw**2 / 2 + by_item**2 / 6))
    assert found.high - found.value == pytest.approx(stats.t.ppf(0.975, found.df) * found.se)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(middle) / found.se, found.df))


@pytest.mark.parametrize(
    "draw, item, cell", [(0.0, 1.0, 0.5), (0.3, 1.0, 0.5), (1.0, 0.1, 0.1), (0.0, 0.0, 1.0), (0.2, 1.0, 0.0)]
)
def test_paired_intervals_hold_the_truth_as_often_as_they_say(draw, item, cell):
    """Whatever the noise consists of. Taking all numbers for independent holds it far too seldom."""
    rng = np.random.default_rng(1)
    held = naive = 0
    for _ in range(600):
        own = crossed(rng, 3, 40, draw=draw, item=item, cell=cell)
        found = crossed_difference(own, np.zeros_like(own), paired=True)
        held += found.low <= 0 <= found.high
        naive += abs(own.mean()) <= 1.96 * own.std(ddof=1) / math.sqrt(own.size)
    assert held / 600 >= 0.93  # two standard errors of a simulated 95 % below
    assert naive / 600 < 0.9 or (draw == item == 0)


@pytest.mark.parametrize("same", [True, False])
def test_one_more_random_subspace_is_not_told_from_random_ones(same):
    """Under the null the estimator finds a random subspace: one and the same in every draw, or another in each."""
    rng = np.random.default_rng(2)
    told = beats_average = 0
    for _ in range(600):
        items = rng.standard_normal(40)
        random = crossed(rng, 8, 40, draw=0.3, item=0, cell=0.2, items=items)
        own = crossed(rng, 3, 40, draw=0.3, item=0, cell=0.2, items=items)
        own = np.repeat(own[:1], 3, axis=0) if same else own
        found = crossed_difference(own, random, paired=False)
        told += not found.low <= 0 <= found.high
        means = random.mean(axis=1)
        beats_average += abs(found.value) > stats.t.ppf(0.975, 7) * means.std(ddof=1) / math.sqrt(8)
    assert told / 600 <= 0.065
    assert beats_average / 600 > 0.2  # what comparing with their average would have claimed


def noise(rng, size, n_draws, draw, shared):
    """A family of comparisons with nothing to find, whose draws go up and down together to the degree `shared`."""
    common = rng.standard_normal((n_draws, 1))
    for _ in range(size):
        own = draw * (math.sqrt(shared) * common + math.sqrt(1 - shared) * rng.standard_normal((n_draws, 1)))
        own = own + 0.7 * rng.standard_normal(40) + 0.3 * rng.standard_normal((n_draws, 40))
        yield own, np.zeros_like(own), True


@pytest.mark.parametrize("draw", [0.1, 0.4])
@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9])
def test_a_family_of_noise_is_seldom_taken_for_an_effect(draw, shared):
    """The draws' own variance alone finds something far too often."""
    rng = np.random.default_rng(5)
    families = [list(noise(rng, 16, 3, draw, shared)) for _ in range(100)]
    told = np.mean([any(one.shown for one in crossed_differences(family)) for family in families])
    assert told <= 0.09  # two standard errors above 5 %
    if draw == 0.4 and shared == 0.0:
        alone = [[crossed_difference(*each[:2], paired=True).p for each in family] for family in families]
        assert np.mean([min(p) < 0.05 / 16 for p in alone]) > 0.1


def test_the_detectable_difference_is_told_four_times_in_five():
    rng = np.random.default_rng(3)

    def family(shift):
        shifts = [shift, *[0.0] * 9]
        draws = [crossed(rng, 3, 40, draw=0.05, item=1.0, cell=0.3) + one for one in shifts]
        return crossed_differences([(own, np.zeros_like(own), True) for own in draws])

    size = float(np.median([one.detectable for _ in range(30) for one in family(0.0)]))
    told = [family(size)[0].shown == "higher" for _ in range(150)]
    assert 0.68 < np.mean(told) < 0.92


def test_the_detectable_difference_has_its_power_at_few_degrees_of_freedom():
    """Against plain simulation of Student's t with a shifted mean."""
    rng = np.random.default_rng(7)
    for df, m in ((3, 31), (8, 10)):
        critical = stats.t.ppf(1 - 0.05 / (2 * m), df)
        shift = _shift(critical, df)
        drawn = (rng.standard_normal(200_000) + shift) / np.sqrt(rng.chisquare(df, 200_000) / df)
        assert np.mean(drawn > critical) == pytest.approx(0.8, abs=0.005)


def test_correction_counts_every_comparison_and_draws_vary_no_less_than_in_the_family():
    rng = np.random.default_rng(4)
    family = [(rng.standard_normal((3, 30)) + shift, np.zeros((3, 30)), True) for shift in (2, 0, 0)]
    alone, together = [crossed_difference(*one[:2], paired=True) for one in family], crossed_differences(family)
    by_draw = [own.mean(axis=1).var(ddof=1) / 3 for own, _, _ in family]
    for one, single, mine in zip(together, alone, by_draw, strict=True):
        assert one.se**2 == pytest.approx(single.se**2 - mine + max(mine, np.mean(by_draw)))
        assert single.p_holm == single.p
    assert together[0].p_holm == pytest.approx(3 * together[0].p)
    assert together[0].detectable > alone[0].detectable
    assert together[0].shown == "higher" and not together[1].shown
    assert crossed_differences([]) == []


def test_equal_numbers_have_no_spread_and_odd_ones_are_refused():
    same = crossed_difference(np.ones((2, 5)), np.ones((2, 5)), paired=True)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    ones = np.ones((2, 5))
    for own, reference, paired in (
        (ones[:1], ones, False), (ones, ones[:1], False), (ones[:, :1], ones[:, :1], True), (ones, ones[:, :4], True),
    ):  # fmt: skip
        with refused("two or more", str(own.shape)):
            crossed_difference(own, reference, paired=paired)
    with refused("as many", 2, 3):
        crossed_difference(ones, np.ones((3, 5)), paired=True)
    with refused("finite"):
        crossed_difference(ones * np.nan, ones, paired=True)
