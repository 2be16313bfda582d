"""Is a subspace better than random ones: the statistics, on cases with known answers."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from spd_lens.analysis.common.against_random import contrasts, matched_draws, moderated
from spd_lens.analysis.sweeps.recommend import overall, recommend
from spd_lens.errors import SPDError
from spd_lens.stats.corrections import holm


def noise(rng, n_cells, *, n_items=24, n_draws=3, draw_sd=0.1, item_sd=0.15):
    """Cells whose own subspace is one more random one; the size of effects differs from cell to cell."""
    effects, controls = [], []
    for _ in range(n_cells):
        size = np.exp(rng.normal(0, 1))
        item = rng.normal(0.5, 1.0, n_items)
        rows = [
            size * (1 + rng.normal(0, draw_sd) + 0.3 * item + rng.normal(0, item_sd, n_items))
            for _ in range(n_draws + 1)
        ]
        effects.append(rows[0])
        controls.append(np.stack(rows[1:]))
    return effects, controls


def table_of(effects, controls, kl=0.05):
    """A sweep's table with these effects on the aligned loss."""
    rows = []
    for i, (own, random, contrast) in enumerate(zip(effects, controls, contrasts(effects, controls), strict=True)):
        half = 2 * own.std(ddof=1) / len(own) ** 0.5
        shared = {"cell": f"c{i}", "layers": str(i), "kind": "kv", "head": "all", "projector": "per_head", "width": 64}
        means = random.mean(axis=1)
        loss = {
            "rank": 4 + i, "value": own.mean(), "low": own.mean() - half, "high": own.mean() + half,
            "random": means.mean(), "random_low": means.min(), "random_high": means.max(), "difference": contrast.value,
            "difference_low": contrast.low, "difference_high": contrast.high, "p": contrast.p,
            "p_holm": contrast.p_holm, "matched": None, "matched_low": None, "matched_high": None,
        }  # fmt: skip
        rows.append({**shared, "measure": "aligned_loss", **loss})
        rows.append({**shared, "measure": "kl", **loss, "value": kl, "random": 2 * kl, "difference": -kl})
    return pd.DataFrame(rows)


def test_two_cells_keep_their_own_variances():
    """Against the formula written out: items and one new draw against the mean of R."""
    rng = np.random.default_rng(0)
    effects, controls = noise(rng, 2)
    for own, random, found in zip(effects, controls, contrasts(effects, controls), strict=True):
        difference = own - random.mean(axis=0)
        item, draw = stats.sem(difference) ** 2, np.var([row.mean() for row in random], ddof=1) * (1 + 1 / 3)
        df = (item + draw) ** 2 / (item**2 / 23 + draw**2 / 2)
        low, high = stats.t.interval(0.95, df, loc=difference.mean(), scale=np.sqrt(item + draw))
        assert (found.value, found.low, found.high) == pytest.approx((difference.mean(), low, high))
        assert found.p == pytest.approx(2 * stats.t.sf(abs(difference.mean()) / np.sqrt(item + draw), df))


def test_holm_is_statsmodels():
    p = np.random.default_rng(1).uniform(size=20) ** 4
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])
    found = contrasts(*noise(np.random.default_rng(1), 10))
    assert [c.p_holm for c in found] == pytest.approx(list(holm(np.array([c.p for c in found]))))


def test_moderated_variances_find_their_prior():
    """Variances drawn around scale × 0.04 with 8 prior degrees of freedom: shrinking brings them nearer the truth."""
    rng = np.random.default_rng(2)
    scales = np.exp(rng.normal(0, 1, 2000))
    truth = scales * 0.04 * 8 / rng.chisquare(8, 2000)
    measured = truth * rng.chisquare(2, 2000) / 2
    shrunk, df = moderated(measured, np.full(2000, 2), scales)
    assert df[0] == pytest.approx(8 + 2, rel=0.25)
    own_error, error = (np.mean(np.log(v / truth) ** 2) for v in (measured, shrunk))
    assert error < own_error / 4


def test_moderated_variances_that_differ_no_more_than_chance_are_one():
    rng = np.random.default_rng(3)
    shrunk, df = moderated(rng.chisquare(4, 30) / 4, np.full(30, 4), np.ones(30))
    assert np.ptp(shrunk) < 0.35 and shrunk.mean() == pytest.approx(1, abs=0.2)
    assert df.max() <= 120


def test_zero_and_few_variances_are_left_alone():
    np.testing.assert_array_equal(moderated(np.array([1.0, 2.0]), np.array([2, 2]), np.ones(2))[0], [1.0, 2.0])
    shrunk, _ = moderated(np.array([0.0, 1, 2, 3]), np.full(4, 2), np.array([0.0, 1, 1, 1]))
    assert shrunk[0] == 0 and np.isfinite(shrunk).all()


@pytest.mark.parametrize("draw_sd", [0.02, 0.6])
def test_false_positives_of_the_recommendation(draw_sd):
    """Pure noise: some cell of 40 is recommended in at most 5 % of sweeps, whether draws scatter little or much."""
    rng = np.random.default_rng(4)
    recommended = 0
    for _ in range(100):
        found = contrasts(*noise(rng, 40, draw_sd=draw_sd))
        recommended += any(c.p_holm < 0.05 for c in found)
    assert recommended <= 9  # 5 % of 100 and two standard errors


def test_items_alone_would_find_something_in_noise():
    """The untreated data fail the same check: paired tests over items take random draws for discoveries."""
    rng = np.random.default_rng(4)
    found = 0
    for _ in range(20):
        effects, controls = noise(rng, 40, draw_sd=0.3)
        pairs = zip(effects, controls, strict=True)
        p = [stats.ttest_1samp(own - random.mean(axis=0), 0).pvalue for own, random in pairs]
        found += min(p) * 40 < 0.05
    assert found >= 18


def test_a_planted_effect_is_recommended():
    effects, controls = noise(np.random.default_rng(5), 30)
    effects[7] = effects[7] - 3 * np.abs(controls[7]).mean()
    advice = recommend(table_of(effects, controls), default="c3")
    assert advice.cell == "c7" and advice.passed == ("c7",)
    assert "layers 7" in advice.reason and "rank 11 of 64" in advice.reason and "over 30 cells" in advice.reason


def test_of_several_that_pass_the_lowest_loss():
    effects, controls = noise(np.random.default_rng(6), 30, draw_sd=0.05)
    for cell in (2, 9):
        effects[cell] = effects[cell] - 6 * np.abs(controls[cell]).mean()
    lowest = min((2, 9), key=lambda cell: effects[cell].mean())
    advice = recommend(table_of(effects, controls))
    assert advice.cell == f"c{lowest}" and set(advice.passed) == {"c2", "c9"}


def test_pure_noise_gives_none_and_keeps_the_default():
    advice = recommend(table_of(*noise(np.random.default_rng(7), 30)), default="c3")
    assert advice.cell is None
    assert advice.reason.startswith("No cell beats random subspaces of its shape beyond noise: of 30 cells")
    assert "Keep the run's own setting (layers 3, kv, per head, rank 7 of 64)" in advice.reason


def test_an_effect_that_costs_too_much_is_not_recommended():
    effects, controls = noise(np.random.default_rng(5), 30)
    effects[7] = effects[7] - 3 * np.abs(controls[7]).mean()
    advice = recommend(table_of(effects, controls, kl=0.2), kl_budget=0.1)
    assert advice.cell is None and "none of them keeps KL within 0.1 nats" in advice.reason
    assert recommend(table_of(effects, controls, kl=0.2), kl_budget=0.3).cell == "c7"


def test_a_worse_cell_is_not_recommended():
    effects, controls = noise(np.random.default_rng(5), 30)
    effects[7] = effects[7] + 3 * np.abs(controls[7]).mean()
    advice = recommend(table_of(effects, controls))
    assert advice.cell is None and "1 are significantly worse than random" in advice.reason


def test_all_cells_are_counted_beside_chance_and_placebo():
    table = table_of(*noise(np.random.default_rng(8), 4)).assign(n_random=3)
    kl = table["measure"] == "kl"
    table.loc[kl, "p_holm"] = [0.01, 0.01, 0.5, 0.01]
    table.loc[kl, "difference"] = [-0.1, -0.1, -0.1, 0.1]
    table.loc[kl, "value"] = [0.1, 0.1, 0.1, 0.3]
    table.loc[kl, "random_low"] = [0.2, 0.2, 0.05, 0.2]
    sentence = overall(table, "kl", pd.DataFrame({"p_holm": [0.01, 0.2, 1.0] * 4}))
    assert "every random subspace of the same shape in 2 of 4 cells (chance: 1)" in sentence
    assert "lower beyond noise in 2 and higher in 1 (Holm)" in sentence
    assert "takes 4 of 12 random subspaces" in sentence


def test_random_subspaces_of_the_same_damage():
    """Where loss grows in proportion to KL, so does what is read off between two ranks."""
    slope = np.array([1.0, -2.0, 0.5])
    ladder = [(np.array([kl, 2 * kl]), np.stack([kl * slope, 2 * kl * slope])) for kl in (0.4, 0.1, 0.2)]
    for kl in (0.0, 0.05, 0.17, 0.4):
        np.testing.assert_allclose(matched_draws(kl, ladder), np.stack([kl * slope] * 2), atol=1e-12)
    assert matched_draws(0.5, ladder) is None


def test_contrasts_refuse_other_items():
    with pytest.raises(SPDError, match="same two or more items"):
        contrasts([np.zeros(4)], [np.zeros((3, 5))])
