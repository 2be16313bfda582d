"""Overlaps: constructed cases with known answers, nulls that hold their level, refusals, figures, the command."""

from __future__ import annotations

import importlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from spd_lens.analysis.common.angles import (
    energy_by_rank,
    energy_share,
    mean_squared_cosine,
    p_value,
    principal_angles,
    random_bases,
)
from spd_lens.analysis.index import analyze
from spd_lens.analysis.overlap import command as overlap
from spd_lens.analysis.overlap import figures as overlap_figures
from spd_lens.analysis.overlap.energy import held_by
from spd_lens.errors import SPDError
from spd_lens.evaluation.teacher_forced import ForcedItem
from spd_lens.models.fingerprint import Fingerprint
from spd_lens.runs.run_dir import Run
from spd_lens.sites import Site
from spd_lens.subspaces.moments import GradientMoments
from spd_lens.subspaces.subspace import Subspace

transfers = importlib.import_module("spd_lens.analysis.overlap.transfer")

SHAPE = Fingerprint(n_layers=4, d_model=32, n_heads=4, n_kv_heads=2, d_head=8, sample=(1.0,))
SITE = Site(1, "k")
HEAD = torch.eye(8, dtype=torch.float64)


def rotated(degrees: float, axes: tuple[int, int] = (0, 4)) -> Float[Tensor, "8 8"]:
    turn = torch.eye(8, dtype=torch.float64)
    (i, j), angle = axes, math.radians(degrees)
    turn[i, i] = turn[j, j] = math.cos(angle)
    turn[j, i], turn[i, j] = math.sin(angle), -math.sin(angle)
    return turn


def spanned(*blocks: Float[Tensor, "width rank"], site: Site = SITE, model: Fingerprint | None = None) -> Subspace:
    return Subspace(
        bases={site: torch.stack(blocks)}, ranks={site: tuple(block.shape[1] for block in blocks)}, fingerprint=model
    )  # fmt: skip


def made(
    rng: np.random.Generator,
    scales: np.ndarray | Mapping[int, np.ndarray],
    *,
    n_shards: int = 8,
    tokens: int = 12,
    examples: int = 2,
    site: Site = SITE,
) -> GradientMoments:
    """Gaussian gradients with these standard deviations per coordinate."""
    moments = GradientMoments.empty(SHAPE, [site], n_shards, {"loss": "aligned", "dtype": "float64"})
    for shard in range(n_shards):
        gradients = rng.normal(size=(tokens, 16)) * scales
        moments.add_tokens(site, shard, torch.from_numpy(gradients), torch.from_numpy(rng.normal(size=(tokens, 16))))
    moments.n_tokens += tokens
    moments.n_examples += examples
    return moments


FIRST = np.tile([4.0, 4.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.1], 2)
SECOND = np.tile([0.1, 0.1, 0.1, 0.1, 4.0, 4.0, 1.0, 1.0], 2)


@pytest.mark.parametrize("degrees", [0.0, 1e-9, 1e-5, 30.0, 45.0, 89.999999, 90.0])
def test_an_angle_is_what_it_was_made_to_be(degrees: float) -> None:
    a = HEAD[:, :3]
    angles = principal_angles(a, rotated(degrees) @ a).rad2deg()
    torch.testing.assert_close(angles[:2], torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    assert float(angles[2]) == pytest.approx(degrees, rel=1e-6, abs=1e-13)


def test_angles_do_not_depend_on_the_basis_or_its_order() -> None:
    a, b = random_bases(2, 8, 3, seed=0)
    turn = random_bases(1, 3, 3, seed=1)[0]
    torch.testing.assert_close(principal_angles(a @ turn, b), principal_angles(a, b))
    torch.testing.assert_close(principal_angles(b, a), principal_angles(a, b))
    cosines = np.linalg.svd(a.numpy().T @ b.numpy(), compute_uv=False)
    np.testing.assert_allclose(principal_angles(a, b).cos(), cosines)


def test_nested_orthogonal_and_partly_shared() -> None:
    a = HEAD[:, :3]
    assert float(mean_squared_cosine(a, HEAD[:, :2])) == 1 and float(mean_squared_cosine(HEAD[:, :2], a)) == 1
    assert float(mean_squared_cosine(a, HEAD[:, 3:6])) == 0
    assert float(mean_squared_cosine(a, HEAD[:, 1:4])) == pytest.approx(2 / 3)
    assert float(mean_squared_cosine(a, rotated(30) @ a)) == pytest.approx((2 + math.cos(math.pi / 6) ** 2) / 3)
    assert principal_angles(a, HEAD[:, :2]).tolist() == [0, 0]
    assert principal_angles(a, HEAD[:, 3:5]).rad2deg().tolist() == [90, 90]


@pytest.mark.parametrize(("rank_a", "rank_b"), [(3, 3), (2, 5)])
def test_random_subspaces_hit_the_expectation(rank_a: int, rank_b: int) -> None:
    cosines = mean_squared_cosine(random_bases(4000, 8, rank_a, seed=0), HEAD[:, :rank_b])
    low, high = stats.ttest_1samp(cosines.numpy(), 0).confidence_interval(0.999)
    assert low < max(rank_a, rank_b) / 8 < high
    gram = torch.diag(torch.tensor([9.0, 5.0, 1.0, 1.0, 0.1, 0, 0, 0], dtype=torch.float64))
    shares = energy_share(random_bases(4000, 8, rank_a, seed=1), gram)
    low, high = stats.ttest_1samp(shares.numpy(), 0).confidence_interval(0.999)
    assert low < rank_a / 8 < high


def test_energy_share_is_a_trace() -> None:
    basis = random_bases(1, 8, 3, seed=2)[0]
    rows = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    projected = rows @ basis @ basis.T
    assert float(energy_share(basis, rows.T @ rows)) == pytest.approx(
        float(projected.square().sum() / rows.square().sum())
    )
    torch.testing.assert_close(
        energy_by_rank(basis, rows.T @ rows),
        torch.stack([energy_share(basis[:, :k], rows.T @ rows) for k in (1, 2, 3)]),
    )


def test_p_values_count_ties_and_are_never_zero() -> None:
    null = torch.tensor([0.1, 0.2, 0.3, 0.3], dtype=torch.float64)
    assert p_value(0.4, null) == 1 / 5
    assert p_value(0.3, null) == 3 / 5
    assert p_value(0.05, null) == 1
    assert p_value(0.15, null, smaller=True) == 2 / 5


def test_compare_reports_angles_cosines_and_chance_per_head() -> None:
    a = spanned(HEAD[:, :3], HEAD[:, :3])
    b = spanned(rotated(30) @ HEAD[:, :3], HEAD[:, 3:6])
    table = overlap.compare_subspaces(a, b, draws=199).set_index(["head", "measure"])
    assert not table.isna().any(axis=None)
    assert table.loc[("0", "largest angle"), "value"] == pytest.approx(30)
    assert table.loc[("0", "smallest angle"), "value"] == pytest.approx(0, abs=1e-10)
    assert table.loc[("0", "mean squared cosine"), "p_random"] == 1 / 200
    assert table.loc[("0", "smallest angle"), "p_random"] == 1 / 200
    assert table.loc[("1", "smallest angle"), "p_random"] == 1
    assert table.loc[("1", "mean squared cosine"), "value"] == 0
    assert table.loc[("1", "mean squared cosine"), "p_random"] == 1
    assert table.loc[("1", "smallest angle"), "value"] == pytest.approx(90)
    assert (table.loc[(slice(None), "mean squared cosine"), "chance"] == 3 / 8).all()
    angles = overlap.angle_table(a, b, draws=50)
    np.testing.assert_allclose(angles[angles["head"] == "0"].value, [0, 0, 30], atol=1e-9)
    assert (angles.random_low <= angles.chance).all() and (angles.chance <= angles.random_high).all()


def test_random_pairs_have_uniform_p_values() -> None:
    found = []
    for seed in range(60):
        a, b = (spanned(basis) for basis in random_bases(2, 8, 3, seed=1000 + seed))
        table = overlap.compare_subspaces(a, b, draws=99, seed=seed)
        found.append(table[table.measure == "mean squared cosine"].p_random.item())
    assert stats.kstest(found, "uniform").pvalue > 1e-3


def test_what_cannot_be_compared_is_refused() -> None:
    per_head, joint = spanned(HEAD[:, :3], HEAD[:, :3]), spanned(torch.eye(16, dtype=torch.float64)[:, :3])
    with pytest.raises(SPDError, match=r"per head \(2 blocks\) and the other joint"):
        overlap.compare_subspaces(per_head, joint)
    with pytest.raises(SPDError, match="only subspaces of one shape"):
        overlap.compare_subspaces(per_head, spanned(*(torch.eye(6, dtype=torch.float64)[:, :3],) * 2))
    with pytest.raises(SPDError, match=r"sites 1.k and the second 2.k"):
        overlap.compare_subspaces(per_head, spanned(HEAD[:, :3], HEAD[:, :3], site=Site(2, "k")))
    one = replace(SHAPE, sample=(1.0, 0.0))
    other = replace(SHAPE, sample=(0.0, 1.0))
    a, b = (spanned(HEAD[:, :3], HEAD[:, :3], model=model) for model in (one, other))
    with pytest.raises(SPDError, match="any_model=True"):
        overlap.compare_subspaces(a, b)
    assert len(overlap.compare_subspaces(a, b, any_model=True, draws=20)) == 8
    with pytest.raises(SPDError, match="3- and 4-dimensional"):
        mean_squared_cosine(torch.eye(3), torch.eye(4))
    rng = np.random.default_rng(0)
    with pytest.raises(SPDError, match=r"sites 1.k and the second 2.v"):
        overlap.energy_overlap({"a": made(rng, FIRST), "b": made(rng, FIRST, site=Site(2, "v"))})
    foreign = replace(made(rng, FIRST), fingerprint=other)
    with pytest.raises(SPDError, match="any_model=True"):
        overlap.permutation_test(replace(foreign, fingerprint=one), foreign)


def test_energy_between_domains_has_its_ceiling_and_its_direction() -> None:
    rng = np.random.default_rng(1)
    table = overlap.energy_overlap({"a": made(rng, FIRST), "b": made(rng, SECOND)}, (1, 2, 4, 8, 16), draws=199)
    assert not table.isna().any(axis=None)
    assert set(table["rank"]) == {1, 2, 4, 8}  # 16 is more than a head has
    at = table[table["of"] == "domain"].set_index(["head", "a", "b", "rank"])
    for head in ("0", "1"):
        assert at.loc[(head, "a", "a", 2), "value"] > 0.9
        assert at.loc[(head, "a", "b", 2), "value"] < 0.05
        assert at.loc[(head, "a", "b", 2), "p_random"] > 0.9
        assert at.loc[(head, "b", "b", 2), "p_random"] == 1 / 200
        assert at.loc[(head, "a", "b", 8), "value"] == pytest.approx(1)
    assert (at.chance == at.index.get_level_values("rank") / 8).all()
    assert ((table.low <= table.value) & (table.value <= table.high)).all()
    used = table[(table["of"] == "activations") & (table["rank"] == 2)]
    assert used.value.mean() < 0.7  # white activations know nothing of the gradients


def test_energy_is_asymmetric_where_one_domain_lies_inside_the_other() -> None:
    rng = np.random.default_rng(2)
    inner = np.tile([4.0, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01], 2)
    outer = np.tile([4.0, 4.0, 4.0, 4.0, 0.01, 0.01, 0.01, 0.01], 2)
    table = overlap.energy_overlap({"inner": made(rng, inner), "outer": made(rng, outer)}, (1, 4), draws=19)
    at = table[table["of"] == "domain"].groupby(["a", "b", "rank"]).value.mean()
    assert at["outer", "inner", 4] > 0.99  # four directions of the outer hold all of the inner
    assert at["inner", "outer", 1] == pytest.approx(1 / 4, abs=0.05)  # subspace in front, gradients behind


def test_full_overlap_against_plain_numpy() -> None:
    rng = np.random.default_rng(3)
    a, b = made(rng, FIRST), made(rng, np.ones(16))
    table = overlap.energy_overlap({"a": a, "b": b}, (3,), per_head=False, draws=19)
    own, other = a.gradient[SITE].sum(0).numpy(), b.gradient[SITE].sum(0).numpy()
    top = np.linalg.eigh(own)[1][:, -3:]
    expected = np.trace(top.T @ other @ top) / np.trace(other)
    row = table[(table["of"] == "domain") & (table.a == "a") & (table.b == "b")]
    assert row.full.item() == pytest.approx(expected) and row["head"].item() == "all"
    held = held_by(a.subspace(3, per_head=False), b)
    assert held.value.item() == pytest.approx(expected) and held.chance.item() == 3 / 16


def test_the_ceiling_is_measured_on_disjoint_halves() -> None:
    """Of white gradients a domain's own other half holds no more than chance; fitted and held alike it would."""
    table = overlap.energy_overlap({"a": made(np.random.default_rng(4), np.ones(16), tokens=4)}, (2,), draws=19)
    row = table[table["of"] == "domain"]
    assert row.value.mean() == pytest.approx(0.25, abs=0.06)
    assert row.full.mean() > 0.4


def test_shuffled_answers_are_a_row_of_their_own_on_disjoint_halves() -> None:
    rng = np.random.default_rng(5)
    a = made(rng, np.ones(16), tokens=4)
    table = overlap.energy_overlap({"a": a}, (2,), shuffled={"a": a}, draws=19)
    by = table.groupby("of").value.mean()
    assert by["shuffled"] == pytest.approx(by["domain"])  # the same moments: the same complementary halves
    with pytest.raises(SPDError, match="same shards"):
        overlap.energy_overlap({"a": a}, (2,), shuffled={"b": a})
    with pytest.raises(SPDError, match="same shards"):
        overlap.energy_overlap({"a": a}, (2,), shuffled={"a": made(rng, FIRST, n_shards=4)})


def test_one_pool_is_rejected_as_often_as_the_level_says() -> None:
    rng = np.random.default_rng(6)
    found = []
    for seed in range(100):
        a, b = made(rng, FIRST, n_shards=5, tokens=4), made(rng, FIRST, n_shards=5, tokens=4)
        table = overlap.permutation_test(a, b, 2, permutations=39, seed=seed)
        found.append(table[table.site == "all"].p_permutation.item())
    rejected = sum(p <= 0.1 for p in found)
    assert stats.binom.cdf(rejected, 100, 0.1) > 0.001 and stats.binom.sf(rejected - 1, 100, 0.1) > 0.001
    assert stats.kstest(found, "uniform").pvalue > 1e-3


def test_a_planted_difference_is_found() -> None:
    rng = np.random.default_rng(7)
    mixed = FIRST + 0.5 * SECOND
    table = overlap.permutation_test(made(rng, FIRST), made(rng, mixed[::-1].copy()), 2, permutations=99)
    assert not table.isna().any(axis=None)
    row = table[table.site == "all"].iloc[0]
    assert row.p_permutation == 1 / 100 and row.value < row.null_low
    assert row.value == pytest.approx(table[table.site != "all"].value.mean())
    with pytest.raises(SPDError, match="cannot be exchanged"):
        overlap.permutation_test(made(rng, FIRST), made(rng, FIRST, examples=10))
    with pytest.raises(SPDError, match="at least 19"):
        overlap.permutation_test(made(rng, FIRST), made(rng, FIRST), permutations=5)


def items(losses: list[float]) -> list[ForcedItem]:
    return [ForcedItem(str(i), loss, loss, 0.1, 0.5) for i, loss in enumerate(losses)]


def test_transfer_pairs_items_and_controls() -> None:
    rng = np.random.default_rng(8)
    moments = {"a": made(rng, FIRST), "b": made(rng, SECOND)}
    subspaces = {name: one.subspace(2) for name, one in moments.items()}
    base = [1.0, 2.0, 3.0, 4.0]
    policies = {"base": items(base), "projected": items([x + 0.5 for x in base])[::-1], "random-1": items(base)}
    table = transfers.transfer(subspaces, moments, {("a", "b"): policies}, {"a": 7, "b": 7})
    assert list(table.outcome) == ["aligned_loss", "completion_loss"] * 2  # as these items have
    table = table[table.outcome == "aligned_loss"]
    row = table[table["of"] == "projected"].iloc[0]
    assert row.low == row.high == pytest.approx(0.5)  # item by item, whatever their order
    assert row.change == pytest.approx(0.5) and row.n == 4 and (row.a, row.b) == ("a", "b")
    assert row.energy == pytest.approx(held_by(subspaces["a"], moments["b"]).value.mean())
    random = table[table["of"] == "random"].iloc[0]
    assert random.change == 0
    assert random.energy == pytest.approx(held_by(subspaces["a"].random_like(8), moments["b"]).value.mean())
    with pytest.raises(SPDError, match="no run was evaluated"):
        transfers.transfer(subspaces, moments, {})
    with pytest.raises(SPDError, match="only subspaces|of different models"):
        held_by(spanned(*(torch.eye(6, dtype=torch.float64)[:, :3],) * 2), moments["a"])


def test_transfer_has_every_loss_of_the_items_that_have_it() -> None:
    rng = np.random.default_rng(8)
    moments = {"a": made(rng, FIRST), "b": made(rng, SECOND)}
    subspaces = {name: one.subspace(2) for name, one in moments.items()}
    base = [replace(one, results_loss=3.0 if i < 3 else None) for i, one in enumerate(items([1.0, 2.0, 3.0, 4.0]))]
    projected = [replace(one, results_loss=None if one.results_loss is None else 3.25) for one in base]
    table = transfers.transfer(subspaces, moments, {("a", "b"): {"base": base, "projected": projected}})
    row = table[table.outcome == "results_loss"].iloc[0]
    assert (row.change, row.n) == (0.25, 3)
    assert [fig.layout.yaxis.title.text for fig in transfers.transfer_figures(table)] == [
        f"change of {name} (nats per token)" for name in ("aligned loss", "results loss", "completion loss")
    ]
    assert "results loss, 1 points: too few" in transfers.transfer_sentence(table)


def test_association_is_one_sided_within_targets_and_knows_its_limits() -> None:
    names = ["a", "b", "c", "d"]
    rows = [
        {
            "a": a,
            "b": b,
            "of": "projected",
            "outcome": "aligned_loss",
            "energy": 0.9 if a == b else 0.4 + 0.05 * i,
            "change": 0.0,
        }
        for b in names
        for i, a in enumerate(names)
    ]
    table = pd.DataFrame(rows)
    # a target's own level says nothing, so it must not matter
    table["change"] = -table.energy + table.b.map({"a": 0.0, "b": 5.0, "c": -3.0, "d": 1.0})
    r, p = transfers.association(table)
    assert r == pytest.approx(-1) and p == 1 / 24
    r, p = transfers.association(table.assign(change=-table.change))
    assert r == pytest.approx(1) and p == 1
    assert "nothing can be concluded" in transfers.transfer_sentence(table)
    few = table[table.a.isin(["a", "b"]) & table.b.isin(["a", "b"])]
    assert "too few for any conclusion" in transfers.transfer_sentence(few)


def test_figures_show_the_tables() -> None:
    rng = np.random.default_rng(9)
    moments = {"first <b>": made(rng, FIRST), "second": made(rng, SECOND), "third": made(rng, FIRST)}
    energy = overlap.energy_overlap(moments, (1, 2, 4), shuffled=moments, draws=19)
    one, other = (moments[name].subspace(2) for name in ("first <b>", "second"))
    angles = overlap.angle_table(one, other, draws=20).assign(pair="first – second")
    exchanged = overlap.permutation_test(moments["second"], moments["third"], 2, permutations=19)
    points = pd.DataFrame(
        [
            {"a": a, "b": b, "of": of, "outcome": "results_loss", "energy": 0.5, "change": 0.1, "low": 0.0, "high": 0.2}
            for a in moments for b in moments for of in ("projected", "random")
        ]
    )  # fmt: skip
    figures = {
        "maps": overlap_figures.heat_map_figure(energy, 2),
        "heads": overlap_figures.heat_map_figure(energy, 2, heads=True),
        "curve": overlap_figures.energy_figure(energy),
        "layers": overlap_figures.layers_figure(energy, 2),
        "angles": overlap_figures.angles_figure(angles),
        "exchange": overlap_figures.exchange_figure(exchanged.assign(pair="second – third")),
        "transfer": transfers.transfer_figure(points, "results_loss"),
    }
    for fig in figures.values():
        assert fig.data and fig.layout.title.text
        assert any(axis.title.text for axis in fig.select_xaxes())
        for trace in fig.data:
            values = np.asarray(trace.z if trace.type == "heatmap" else trace.y)
            assert not pd.isna(values).any()
    grid = figures["maps"].data[0]
    expected = energy[(energy["rank"] == 2) & (energy["of"] == "domain")].groupby(["a", "b"]).value.mean()
    assert list(grid.x) == ["first &lt;b&gt;", "second", "third"]
    assert list(grid.y) == [*grid.x, "own prompts, shuffled answers", "own activations"]
    assert grid.z[0][1] == pytest.approx(expected["first <b>", "second"])  # row: subspace, column: gradients
    assert grid.z[1][0] == pytest.approx(expected["second", "first <b>"])
    assert figures["maps"].layout.coloraxis.cmin == 0 and figures["maps"].layout.coloraxis.cmax == 1
    for trace in figures["curve"].data:
        if trace.name in (overlap_figures.CHANCE, *overlap_figures.NULLS.values()):
            assert trace.line.color == "#8A8A8A" and trace.line.dash == "dot"


def test_command_on_runs(finished_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        shutil.copytree(finished_run.path, tmp_path / name)
    arguments = [str(tmp_path / "one"), str(tmp_path / "two"), "--permutations", "19", "--draws", "99", "--quiet"]
    with pytest.raises(SystemExit) as stop:
        analyze(["overlap", *arguments, "--rank", "2", "--all-layers"])
    assert stop.value.code in (0, None)
    out = " ".join(capsys.readouterr().out.split())
    assert "energy held by 2 of 8 directions" in out and "one pool: one – two (p = 1)" in out
    folder = tmp_path / "one" / "analysis"
    assert not (tmp_path / "two" / "analysis" / "overlap.csv").exists()
    for name in ("overlap", "overlap-exchange", "overlap-angles", "overlap-layers", "overlap-transfer"):
        assert not pd.read_csv(folder / f"{name}.csv").isna().any(axis=None)
    table = pd.read_csv(folder / "overlap.csv")
    same = table[(table["of"] == "domain") & (table["rank"] == 2)].set_index(["site", "head", "a", "b"])
    # two copies of one run: all of one holds of the other what it holds of itself
    for (site, head, a, _), row in same.iterrows():
        assert row.full == pytest.approx(same.loc[(site, head, a, a), "full"])
    transfer = pd.read_csv(folder / "overlap-transfer.csv")
    assert set(transfer["of"]) == {"projected", "random"}
    with pytest.raises(SystemExit) as stop:
        analyze(["overlap", *arguments, "--joint", "--no-shuffled"])
    assert set(pd.read_csv(folder / "overlap.csv")["head"]) == {"all"}
    for wrong, says in (([arguments[0]], "two runs or more"), ([*arguments, "--rank", "many"], "neither an integer")):
        with pytest.raises(SystemExit) as stop:
            analyze(["overlap", *wrong])
        assert stop.value.code == 2 and says in " ".join(capsys.readouterr().err.split())
