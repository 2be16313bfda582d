"""Spectra: effective ranks with known answers, intervals that cover, nulls, figures, the command."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from spd_lens.analysis.common.angles import entropy_rank, participation_ratio, stable_rank
from spd_lens.analysis.common.jackknife import filled, half_width, halves, sets, shard_grams
from spd_lens.analysis.index import analyze
from spd_lens.analysis.spectra import command as spectra
from spd_lens.analysis.spectra import figures as spectra_figures
from spd_lens.analysis.spectra.measures import ACTIVATIONS, CENTRED, ENERGY, GRADIENTS, HELD_OUT, SHUFFLED, SINGULAR
from spd_lens.errors import SPDError
from spd_lens.models.fingerprint import Fingerprint
from spd_lens.runs.run_dir import Run
from spd_lens.sites import Site
from spd_lens.subspaces.moments import GradientMoments
from spd_lens.subspaces.spectrum import BlockSpectrum, rank_holding

SHAPE = Fingerprint(n_layers=4, d_model=32, n_heads=4, n_kv_heads=2, d_head=8, sample=(1.0,))
SITES = [Site(1, "k"), Site(3, "v")]


def made(
    rng: np.random.Generator, scales: np.ndarray, *, n_shards: int = 8, tokens: int = 30, mean: float = 0.0
) -> GradientMoments:
    """Gaussian gradients with these standard deviations per coordinate; activations white around a mean."""
    moments = GradientMoments.empty(SHAPE, SITES, n_shards, {"loss": "aligned", "dtype": "float64"})
    for site in SITES:
        for shard in range(n_shards):
            gradients = rng.normal(size=(tokens, 16)) * scales
            activations = rng.normal(size=(tokens, 16)) + mean
            moments.add_tokens(site, shard, torch.from_numpy(gradients), torch.from_numpy(activations))
    moments.n_tokens += tokens
    moments.n_examples += 2
    return moments


@pytest.fixture(scope="module")
def few() -> GradientMoments:
    """Three strong directions per head of eight."""
    return made(np.random.default_rng(0), np.tile([3.0, 3.0, 3.0, 0.01, 0.01, 0.01, 0.01, 0.01], 2), mean=2.0)


def test_equal_energies_count_themselves() -> None:
    energies = torch.tensor([[4.0, 4.0, 4.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    for measure in (participation_ratio, entropy_rank, stable_rank):
        torch.testing.assert_close(measure(energies), torch.tensor([3.0, 1.0]))
    assert rank_holding(energies, 0.9).tolist() == [3, 1]
    assert rank_holding(energies, 0.6).tolist() == [2, 1]
    assert rank_holding(energies, 1.0).tolist() == [3, 1]


def test_effective_ranks_of_an_uneven_spectrum() -> None:
    energies = torch.tensor([8.0, 1.0, 1.0])
    assert float(participation_ratio(energies)) == pytest.approx(100 / 66)
    shares = [0.8, 0.1, 0.1]
    assert float(entropy_rank(energies)) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert float(stable_rank(energies)) == pytest.approx(10 / 8)
    assert float(rank_holding(energies, 0.9)) == 2


def test_shards_add_up_to_the_blocks(few: GradientMoments) -> None:
    for per_head in (True, False):
        for of in ("gradient", "activation"):
            summed = shard_grams(few, SITES[0], per_head, of).sum(dim=0)
            torch.testing.assert_close(summed, few.blocks(SITES[0], per_head, of=of))


def test_directions_are_singular_vectors_and_stop_at_rounding() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(20, 3)) @ rng.normal(size=(3, 8))
    energies, vectors = BlockSpectrum.of(torch.from_numpy(rows.T @ rows)).known("float32")
    _, values, right = np.linalg.svd(rows)
    np.testing.assert_allclose(energies.sqrt()[:3], values[:3], rtol=1e-8)
    assert energies[3:].eq(0).all() and vectors[:, 3:].eq(0).all()
    np.testing.assert_allclose(np.abs(np.diag(right[:3] @ vectors[:, :3].numpy())), 1, atol=1e-8)


def test_spread_over_halves_is_the_standard_error_of_a_mean() -> None:
    values = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0], dtype=torch.float64)
    for n in (8, 7):
        here = values[:n]
        weights = halves(n)
        assert weights.shape == (math.comb(n, n // 2), n)
        means = weights @ here / weights.sum(dim=1)
        expected = stats.t.ppf(0.975, n - 1) * float(here.std()) / n**0.5
        assert float(half_width(means, n)) == pytest.approx(expected)


def test_many_shards_draw_halves_at_random() -> None:
    weights = halves(20, seed=3)
    assert weights.shape == (128, 20) and weights.sum(dim=1).eq(10).all()
    assert torch.equal(weights, halves(20, seed=3)) and not torch.equal(weights, halves(20, seed=4))
    assert sets(20)[0].eq(1).all()


def test_strong_directions_are_counted(few: GradientMoments) -> None:
    table = spectra.effective_ranks(few)
    assert not table.isna().any(axis=None)
    mine = table.set_index(["site", "head", "measure"])
    for site in ("1.k", "3.v"):
        for head in ("0", "1"):
            assert mine.loc[(site, head, "rank of 90 % energy"), "value"] == 3
            assert mine.loc[(site, head, "entropy rank"), "value"] == pytest.approx(3, abs=0.1)
            assert mine.loc[(site, head, "participation ratio"), "value"] == pytest.approx(3, abs=0.1)
    joint = spectra.effective_ranks(few, per_head=False)
    assert set(joint["head"]) == {"all"} and set(joint.width) == {16}
    assert (joint[joint.measure == "rank of 90 % energy"].value == 6).all()
    assert ((table.low <= table.value) & (table.value <= table.high) & (table.low >= 1)).all()


def test_intervals_cover_what_more_shards_of_the_kind_give() -> None:
    """The interval is about the statistic at this number of examples: its mean over fresh draws lies inside."""
    rng = np.random.default_rng(2)
    scales = np.tile(2.0 ** -np.arange(8), 2)
    tables = [spectra.effective_ranks(made(rng, scales)) for _ in range(60)]
    found = pd.concat([t[(t.measure == "entropy rank") & (t["head"] == "0") & (t.site == "1.k")] for t in tables])
    centre = found.value.mean()
    covered = ((found.low <= centre) & (centre <= found.high)).sum()
    assert 50 <= covered <= 60  # 57 expected; fewer than 50 would happen once in 2,000 times


def test_spectrum_against_plain_numpy(few: GradientMoments) -> None:
    table = spectra.spectrum(few)
    assert not table.isna().any(axis=None)
    block = few.gradient[SITES[1]].sum(0).numpy()[8:, 8:]
    values = np.sort(np.linalg.eigvalsh(block))[::-1]
    mine = table[(table.site == "3.v") & (table["head"] == "1")].set_index("measure")
    np.testing.assert_allclose(mine.loc[SINGULAR, "value"], np.sqrt(values), rtol=1e-6)
    np.testing.assert_allclose(mine.loc[ENERGY, "value"], np.cumsum(values) / values.sum(), rtol=1e-9)
    assert mine.loc[ENERGY, "value"].iloc[-1] == pytest.approx(1)
    # what was not fitted holds less, and noise directions hold what chance does
    assert (mine.loc[HELD_OUT, "value"].to_numpy() <= mine.loc[ENERGY, "value"].to_numpy() + 1e-9).all()


def test_interval_of_a_singular_value_is_that_of_the_whole_set() -> None:
    """One direction: `σ²` is a sum over shards, whose standard error is known."""
    moments = made(np.random.default_rng(8), np.r_[1.0, np.zeros(15)], tokens=200)
    row = spectra.spectrum(moments).query("site == '1.k' and measure == 'singular value'").iloc[0]
    shares = moments.gradient[SITES[0]][:, 0, 0].numpy()
    assert row.value == pytest.approx(math.sqrt(shares.sum()))
    error = shares.std(ddof=1) * 8**0.5 / (2 * row.value)
    assert row.high - row.value == pytest.approx(stats.t.ppf(0.975, 7) * error, rel=0.05)


def test_held_out_energy_sees_overfitting() -> None:
    """White gradients have no leading directions: the fitted share is above chance, the held-out one is not."""
    table = spectra.spectrum(made(np.random.default_rng(3), np.ones(16), tokens=4))
    at = table[table["rank"] == 2].groupby("measure").value.mean()
    assert at[ENERGY] > 0.36
    assert at[HELD_OUT] == pytest.approx(0.25, abs=0.05)


def test_activations_with_and_without_their_mean(few: GradientMoments) -> None:
    around = spectra.effective_ranks(few, source=ACTIVATIONS)
    centred = spectra.effective_ranks(few, source=CENTRED)
    stable = [t[t.measure == "stable rank"].value.mean() for t in (around, centred)]
    assert stable[0] < 1.5 and stable[1] > 5  # the mean of 2 dominates until it is taken out
    gram, total = few.activation[SITES[0]].sum(0).numpy(), few.activation_sum[SITES[0]].sum(0).numpy()
    plain = np.linalg.eigvalsh((gram - np.outer(total, total) / 240)[:8, :8])
    mine = centred[(centred.measure == "stable rank") & (centred.site == "1.k") & (centred["head"] == "0")]
    assert mine.value.item() == pytest.approx(plain.sum() / plain.max())


def test_activation_kept_against_the_projection_itself(few: GradientMoments) -> None:
    kept = spectra.activation_kept(few, draws=50)
    assert not kept.isna().any(axis=None)
    subspace = few.subspace(3)
    projector = subspace.projector(SITES[0])[1]
    mean = few.mean(SITES[0])[1]
    mine = kept[(kept.site == "1.k") & (kept["head"] == "1") & (kept["rank"] == 3)].set_index("part")
    assert mine.loc["mean", "value"] == pytest.approx(float(mean @ projector @ mean / (mean @ mean)))
    rest = few.blocks(SITES[0], of="activation")[1] / 240 - torch.outer(mean, mean)
    assert mine.loc["rest", "value"] == pytest.approx(float((projector @ rest).trace() / rest.trace()))
    assert mine.loc["rest", "chance"] == 3 / 8
    whole = kept[kept["rank"] == 8]
    np.testing.assert_allclose(whole.value, 1)


def test_random_range_of_the_mean_holds_95_percent(few: GradientMoments) -> None:
    kept = spectra.activation_kept(few, draws=20)
    row = kept[(kept.part == "mean") & (kept["rank"] == 3)].iloc[0]
    mean = few.mean(SITES[0])[0]
    drawn = [few.subspace(3).random_like(seed).projector(SITES[0])[0] for seed in range(300)]
    shares = torch.stack([mean @ projector @ mean / (mean @ mean) for projector in drawn])
    inside = ((shares >= row.random_low) & (shares <= row.random_high)).double().mean()
    assert 0.91 <= inside <= 0.985


def test_rank_difference_is_zero_with_itself_and_finds_a_planted_one(few: GradientMoments) -> None:
    assert spectra.rank_difference(few, few).value == 0
    wide = made(np.random.default_rng(5), np.ones(16))
    change = spectra.rank_difference(few, wide)
    assert change.high < -3 and change.n == 8
    assert spectra.rank_difference(wide, few).value == pytest.approx(-change.value)
    with pytest.raises(SPDError, match="paired"):
        spectra.rank_difference(few, made(np.random.default_rng(5), np.ones(16), n_shards=4))


def test_a_head_without_gradients_is_left_out() -> None:
    moments = made(np.random.default_rng(6), np.r_[np.ones(8), np.zeros(8)])
    for table in (spectra.spectrum(moments), spectra.effective_ranks(moments)):
        assert set(table["head"]) == {"0"} and not table.isna().any(axis=None)
    assert math.isfinite(spectra.rank_difference(moments, moments).value)


def test_shards_without_examples_are_left_out(few: GradientMoments) -> None:
    sparse = few.shards([0, 1, 2, 0])
    for name in ("gradient", "activation", "activation_sum"):
        for site in SITES:
            getattr(sparse, name)[site][3] = 0
    sparse.n_examples[3] = 0
    assert filled(sparse).n_shards == 3
    pd.testing.assert_frame_equal(spectra.spectrum(sparse), spectra.spectrum(few.shards([0, 1, 2])))
    with pytest.raises(SPDError, match="at least two shards"):
        spectra.spectrum(few.shards([0]))
    with pytest.raises(SPDError, match="unknown source"):
        spectra.spectrum(few, source="weights")


def test_figures_show_the_tables(few: GradientMoments) -> None:
    sources = (GRADIENTS, SHUFFLED, ACTIVATIONS, CENTRED)
    curves = pd.concat([spectra.spectrum(few, source=source) for source in sources])
    ranks = pd.concat([spectra.effective_ranks(few, source=source) for source in sources])
    kept = spectra.activation_kept(few, draws=20)
    figures = [
        spectra_figures.cumulative_figure(curves), spectra_figures.singular_figure(curves),
        spectra_figures.ranks_figure(ranks), spectra_figures.kept_figure(kept), spectra_figures.layers_figure(ranks),
    ]  # fmt: skip
    for fig in figures:
        assert fig.data and fig.layout.title.text
        axes = [axis.title.text for axis in (*fig.select_xaxes(), *fig.select_yaxes())]
        assert any(axes)
        for trace in fig.data:
            assert not any(value is None or value != value for value in (*trace.x, *trace.y))
    named = {trace.name for trace in figures[0].data if trace.showlegend}
    assert named == {"head 0", "head 1", "held-out half", SHUFFLED, ACTIVATIONS, CENTRED}
    for trace in figures[0].data:
        if trace.name in sources[1:]:
            assert trace.line.color == "#8A8A8A" and trace.line.dash == "dot"
    heads = [trace for trace in figures[0].data if trace.name == "head 0"]
    expected = curves[(curves.source == GRADIENTS) & (curves.measure == ENERGY) & (curves["head"] == "0")]
    shown = expected[(expected.site == "1.k") & expected["rank"].isin([1, 2, 3, 4, 6, 8])]
    np.testing.assert_allclose(heads[0].y, shown.value)
    dots = next(trace for trace in figures[2].data if trace.name == GRADIENTS)
    assert list(dots.x) == [3, 3, 3, 3] and list(dots.y) == [0, 1, 2, 3]
    assert list(figures[2].layout.yaxis.ticktext) == ["1.k · 0", "1.k · 1", "3.v · 0", "3.v · 1"]


def test_sentences_give_the_numbers_and_the_chance(few: GradientMoments) -> None:
    says = spectra.headline(spectra.effective_ranks(few))
    assert "3 of 8 directions (median 3)" in says
    text = spectra_figures.kept_sentence(spectra.activation_kept(few, draws=20), 0.5)
    assert "chance is 0.50" in text


def test_command_on_a_run(finished_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "mine"
    shutil.copytree(finished_run.path, copy)
    with pytest.raises(SystemExit) as stop:
        analyze(["spectra", str(copy), "--all-layers", "--draws", "20", "--quiet"])
    assert stop.value.code in (0, None)
    out = " ".join(capsys.readouterr().out.split())
    assert "directions that hold 90 %" in out and "shuffled answers" in out
    folder = copy / "analysis"
    table = pd.read_csv(folder / "spectra.csv")
    assert set(table.source) == {GRADIENTS, SHUFFLED, ACTIVATIONS, CENTRED} and set(table["head"]) == {"0", "1", "all"}
    assert not table.isna().any(axis=None)
    assert json.loads((folder / "spectra.json").read_text())["shards"] == 8
    assert set(pd.read_csv(folder / "spectra-layers.csv").layer) == {0, 1, 2, 3}
    page = (folder / "spectra.html").read_text()
    assert page.count('class="plotly-graph-div"') == 6
    # a second start takes the moments that the first one left
    before = (folder / "moments-shuffled-0.safetensors").stat().st_mtime_ns
    with pytest.raises(SystemExit):
        analyze(["spectra", str(copy), "--draws", "20", "--quiet"])
    assert (folder / "moments-shuffled-0.safetensors").stat().st_mtime_ns == before
