"""The sweep itself on a tiny model: right numbers, no needless work, and a killed one that goes on."""

import importlib
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from spd_lens import extract
from spd_lens.analysis.common.against_random import contrasts
from spd_lens.analysis.common.subject import Subject
from spd_lens.analysis.sweeps import confirm as chosen
from spd_lens.analysis.sweeps import ranks as rank_sweep
from spd_lens.analysis.sweeps.engine import measure, sweep
from spd_lens.analysis.sweeps.grid import Grid
from spd_lens.analysis.sweeps.report import default_cell, report
from spd_lens.analysis.sweeps.store import MEASURES, Store
from spd_lens.errors import SPDError
from spd_lens.evaluation.skip_layers import exact_starts
from spd_lens.sites import Site
from spd_lens.subspaces.policy import Policy
from tests.helpers import EXAMPLES, hook_at, refused

sweep_figures = importlib.import_module("spd_lens.analysis.sweeps.figures")

GRID = Grid(ranks=[1, 2, 4], layers=["3", "last_mid", "all"], n_random=3)


@pytest.fixture(scope="module")
def moments(tiny_pair):
    return extract(tiny_pair, EXAMPLES, layers="all", shards=2, progress=False)


@pytest.fixture(scope="module")
def undisturbed(tiny_pair, moments):
    """A finished sweep of nine cells."""
    return sweep(tiny_pair, moments, EXAMPLES, GRID, progress=False)


def reference(pair, example, projectors):
    """Aligned loss and KL from base with explicit matrices, one example at a time, all in float64 after the logits."""
    encoded = pair.encode(example)
    ids = torch.tensor([encoded.ids])
    with torch.no_grad():
        base = pair.hf(ids).logits[0].double().log_softmax(-1)
        handles = [hook_at(pair.hf, site, lambda x, p=p: x @ p.to(x)) for site, p in projectors.items()]
        mine = pair.hf(ids).logits[0].double().log_softmax(-1)
        for handle in handles:
            handle.remove()
    loss = np.mean([-mine[t - 1, encoded.ids[t]].item() for t in encoded.scored])
    places = [t - 1 for t in range(encoded.completion_start, len(encoded.ids))]
    kl = np.mean([(base[t].exp() * (base[t] - mine[t])).sum().item() for t in places])
    return loss, kl


def top_directions(moments, site, rank):
    """`P` of each head by numpy's SVD of the Gram matrix's block, as one block-diagonal matrix."""
    gram = moments.gradient[site].sum(0).numpy()
    blocks = []
    for head in range(2):
        u = np.linalg.svd(gram[head * 8 : head * 8 + 8, head * 8 : head * 8 + 8])[0][:, :rank]
        blocks.append(torch.tensor(u @ u.T))
    return torch.block_diag(*blocks)


def test_a_cell_is_the_projection_it_names(tiny_pair, moments, undisturbed):
    cell = next(m for m in undisturbed.cells if m.cell.layers == "last_mid" and m.cell.rank == 2)
    sites = [Site(layer, kind) for layer in (1, 3) for kind in "kv"]
    projectors = {site: top_directions(moments, site, 2) for site in sites}
    for i, example in enumerate(EXAMPLES):
        loss, kl = reference(tiny_pair, example, projectors)
        assert cell.own["aligned_loss"][i] == pytest.approx(loss, rel=1e-4, abs=1e-4)
        assert cell.own["kl"][i] == pytest.approx(kl, rel=1e-3, abs=1e-4)
        base_loss, _ = reference(tiny_pair, example, {})
        assert undisturbed.base["aligned_loss"][i] == pytest.approx(base_loss, rel=1e-4, abs=1e-4)
    assert cell.ranks == (2,) * 8


def test_cells_of_centred_gradients_are_another_sweep(tiny_pair, moments, tmp_path):
    grid = Grid(ranks=[2], layers=["last_mid_from_0"], n_random=3)
    how = {"folder": tmp_path / "kept", "progress": False}
    (found,) = sweep(tiny_pair, moments, EXAMPLES, grid, center_gradients=True, **how).cells
    assert {site.layer for site in found.cell.sites} == {2, 3}
    wanted = moments.subspace(2, sites=found.cell.sites, center_gradients=True)
    assert found.cell.subspace(moments, center_gradients=True).digest() == wanted.digest()
    projectors = {site: torch.block_diag(*wanted.projector(site)) for site in wanted.sites}
    for i, example in enumerate(EXAMPLES):
        loss, _ = reference(tiny_pair, example, projectors)
        assert found.own["aligned_loss"][i] == pytest.approx(loss, rel=1e-4, abs=1e-4)
    with refused("center_gradients"):
        sweep(tiny_pair, moments, EXAMPLES, grid, **how)


def test_controls_are_random_subspaces_of_the_same_shape(tiny_pair, moments, undisturbed):
    cell = next(m for m in undisturbed.cells if m.cell.layers == "3" and m.cell.rank == 1)
    own = cell.cell.subspace(moments)
    for seed, values in enumerate(cell.random):
        control = own.random_like(seed)
        projectors = {site: torch.block_diag(*control.projector(site)) for site in control.sites}
        loss, kl = reference(tiny_pair, EXAMPLES[2], projectors)
        assert (values["aligned_loss"][2], values["kl"][2]) == pytest.approx((loss, kl), rel=1e-3, abs=1e-4)
    assert len({values["kl"][0] for values in cell.random}) == 3


def test_the_table_says_what_was_measured(undisturbed):
    table = undisturbed.table()
    assert len(table) == 9 * len(undisturbed.measures)
    for measured in undisturbed.cells:
        row = table[(table["cell"] == measured.cell.name) & (table["measure"] == "aligned_loss")].iloc[0]
        change = measured.own["aligned_loss"] - undisturbed.base["aligned_loss"]
        draws = [(r["aligned_loss"] - undisturbed.base["aligned_loss"]).mean() for r in measured.random]
        assert row["value"] == pytest.approx(change.mean())
        assert row["low"] <= row["value"] <= row["high"]
        expected = (np.mean(draws), min(draws), max(draws))
        assert tuple(row[["random", "random_low", "random_high"]]) == pytest.approx(expected)
        assert row["difference"] == pytest.approx(row["value"] - row["random"])
        assert row["difference_low"] < row["difference"] < row["difference_high"]
        assert (row["n_items"], row["n_random"]) == (6, 3)


def test_the_placebo_puts_each_draw_in_the_place_of_the_cell(undisturbed):
    placebo = undisturbed.placebo("kl")
    assert len(placebo) == 9 * 3
    draws = [measured.random_change(undisturbed.base, "kl") for measured in undisturbed.cells]
    expected = contrasts([d[1] for d in draws], [d[[0, 2]] for d in draws])
    second = placebo[placebo["draw"] == 1]
    assert list(second["cell"]) == [measured.cell.name for measured in undisturbed.cells]
    assert list(second["p"]) == [c.p for c in expected] and list(second["p_holm"]) == [c.p_holm for c in expected]


def test_layers_below_are_not_run_again_and_nothing_changes(tiny_pair, moments, undisturbed, monkeypatch):
    cells = GRID.cells(moments)
    passes = {layer: 0 for layer in range(4)}

    def count(layer):
        passes[layer] += 1

    policies = [Policy("one", cells[0].subspace(moments))]
    assert policies[0].first_layer(tiny_pair) == 3
    exact_starts(tiny_pair, {3})  # tried once for a model, in passes of its own
    handles = [
        block.mlp.register_forward_hook(lambda *_, layer=layer: count(layer))
        for layer, block in enumerate(tiny_pair.hf.model.layers)
    ]
    short = measure(tiny_pair, EXAMPLES, policies, batch_tokens=10_000)["one"]
    assert passes == {0: 1, 1: 1, 2: 1, 3: 2}  # the base model and, in the last layer, the policy
    monkeypatch.setattr(Policy, "first_layer", lambda policy, pair: 0)
    whole = measure(tiny_pair, EXAMPLES, policies, batch_tokens=10_000)["one"]
    assert passes == {0: 3, 1: 3, 2: 3, 3: 4}
    for handle in handles:
        handle.remove()
    assert whole.keys() == short.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], short[name])
    assert all("forward" not in vars(block) for block in tiny_pair.hf.model.layers)


def test_a_killed_sweep_goes_on_to_the_same_table(tiny_pair, moments, undisturbed, tmp_path, monkeypatch):
    put = Store.put

    def dying(self, measured):
        if len(list(tmp_path.glob("L*.json"))) == 4:
            raise KeyboardInterrupt
        put(self, measured)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "put", dying)
        sweep(tiny_pair, moments, EXAMPLES, GRID, folder=tmp_path, chunk=3, progress=False)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("L*.json")}
    assert len(kept) == 4
    resumed = sweep(tiny_pair, moments, EXAMPLES, GRID, folder=tmp_path, chunk=2, progress=False)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # not measured again
    pd.testing.assert_frame_equal(resumed.table(), undisturbed.table())


def test_a_folder_takes_more_cells(tiny_pair, moments, undisturbed, tmp_path):
    fewer = GRID.model_copy(update={"ranks": [2], "layers": ["3"]})
    assert len(sweep(tiny_pair, moments, EXAMPLES, fewer, folder=tmp_path, progress=False).cells) == 1
    more = sweep(tiny_pair, moments, EXAMPLES, GRID, folder=tmp_path, progress=False)
    pd.testing.assert_frame_equal(more.table(), undisturbed.table())


@pytest.mark.parametrize(
    ("change", "named"),
    [({"n_random": 4}, "n_random: 3 there, 4 now"), ({"seed": 1}, "seed: 0 there, 1 now")],
)
def test_other_settings_are_refused_by_name(tiny_pair, moments, tmp_path, change, named):
    small = Grid(ranks=[1], layers=["3"])
    sweep(tiny_pair, moments, EXAMPLES, small, folder=tmp_path, progress=False)
    with pytest.raises(SPDError, match=named):
        sweep(tiny_pair, moments, EXAMPLES, small.model_copy(update=change), folder=tmp_path, progress=False)
    with pytest.raises(SPDError, match="items: "):
        sweep(tiny_pair, moments, EXAMPLES[:4], small, folder=tmp_path, progress=False)
    with pytest.raises(SPDError, match=r"strength: 1.0 there, 0.5 now"):
        sweep(tiny_pair, moments, EXAMPLES, small, folder=tmp_path, strength=0.5, progress=False)


def test_a_damaged_cell_is_named(tiny_pair, moments, tmp_path):
    small = Grid(ranks=[1], layers=["3"])
    sweep(tiny_pair, moments, EXAMPLES, small, folder=tmp_path, progress=False)
    cell = next(tmp_path.glob("L*.json"))
    cell.write_text('{"ranks": [1], "own": {}, "random": []}')
    with pytest.raises(SPDError, match=f"{cell.name}.*remove it"):
        sweep(tiny_pair, moments, EXAMPLES, small, folder=tmp_path, progress=False)


def test_figures(undisturbed):
    table = undisturbed.table()
    table.loc[0, "layers"] = "<b>1</b>"  # whatever names a set of layers is text
    for figure in sweep_figures.figures(table, recommended=table["cell"].iloc[0]):
        page = figure.to_json()
        assert "NaN" not in page and "<b>1</b>" not in page
        titles = [axis.title.text for axis in figure.select_xaxes()] + [
            axis.title.text for axis in figure.select_yaxes()
        ]
        assert any(title and "rank" in title or title and "nats" in title for title in titles)
    curves = sweep_figures.rank_curves(undisturbed.table(), "kl")
    null = [trace for trace in curves.data if trace.name == "random subspaces of the same ranks"]
    assert len(null) == 3 and all(trace.line.dash == "dot" for trace in null)
    own = [trace for trace in curves.data if trace.name == "gradient subspace"]
    for trace in own:  # at full rank the model is itself
        assert (trace.x[-1], trace.y[-1]) == (8, 0.0)
    heat = sweep_figures.heat_map(undisturbed.table(), "kl").data[0]
    rows = undisturbed.table().query("measure == 'kl'").set_index(["layers", "rank"])["difference"]
    for y, label in enumerate(heat.y):
        for x, rank in enumerate(heat.x):
            assert heat.z[y][x] == rows[(label, int(rank))]


def test_chosen_cells_are_measured_on_fresh_items(tiny_pair, moments):
    subspace = moments.subspace(4, sites=[Site(3, "k"), Site(3, "v")])
    rows = chosen.remeasure(tiny_pair, EXAMPLES, {"cell": subspace}, n_random=4).set_index("measure")
    base = [reference(tiny_pair, e, {})[0] for e in EXAMPLES]
    projectors = {site: torch.block_diag(*subspace.projector(site)) for site in subspace.sites}
    found = [reference(tiny_pair, e, projectors) for e in EXAMPLES]
    assert rows.loc["aligned_loss", "value"] == pytest.approx(np.mean([x[0] for x in found]) - np.mean(base), abs=1e-3)
    assert rows.loc["kl", "value"] == pytest.approx(np.mean([x[1] for x in found]), abs=1e-3)
    losses = []
    for seed in range(1000, 1004):  # other draws than the sweep's
        control = subspace.random_like(seed)
        projectors = {site: torch.block_diag(*control.projector(site)) for site in control.sites}
        losses.append(np.mean([reference(tiny_pair, e, projectors)[0] for e in EXAMPLES]) - np.mean(base))
    expected = (np.mean(losses), min(losses), max(losses))
    assert tuple(rows.loc["aligned_loss", ["random", "random_low", "random_high"]]) == pytest.approx(expected, abs=1e-3)


def test_the_command_sweeps_recommends_and_generates(finished_run, tiny_pair, tmp_path):
    run = shutil.copytree(finished_run.path, tmp_path / "run")
    (run / "grid.yaml").write_text("ranks: [1, 4]\nprojectors: [per_head]\nn_items: 4\n")
    subject = Subject(run, pair=tiny_pair, progress=False)
    grid = Grid.read(run / "grid.yaml", rank_sweep.own_layers(subject.run.config))
    also = {"answer_only": True, "other_text": True}
    advice = report("rank_sweep", subject, grid, **also)
    table = subject.saved("rank_sweep")
    assert set(table["measure"]) == set(MEASURES)  # synthetic math has them all
    assert "results loss" in advice.reason
    assert sorted(table["rank"].unique()) == [1, 4] and set(table["layers"]) == {"last_mid"}
    assert subject.facts("rank_sweep")["reason"] == advice.reason
    page = (run / "analysis" / "rank_sweep.html").read_text(encoding="utf-8")
    assert advice.reason.split(":")[0].split("(")[0] in page and "copying is not enough" in page
    dear = subject.saved("rank_sweep-chosen")
    default = default_cell(subject, subject.moments_everywhere())
    assert default.name == "L1+3.kv.all.per_head.r4"
    assert {"base", default.name} <= set(dear["cell"])
    assert {*MEASURES, "kl_own", "accuracy", "repetition", "truncated"} == set(dear["measure"])
    assert dear.loc[dear["measure"] == "aligned_loss", "n_random"].eq(10).all()
    assert report("rank_sweep", subject, grid, generate=False, **also) == advice  # from what was kept
    kept = run / "analysis" / "completions" / "source"  # by the subspace: for every sweep of the run
    written = {"base", *(cell.subspace(subject.moments_everywhere()).digest() for cell in [default])}
    assert written <= {path.stem for path in kept.glob("*.jsonl")}
    pd.testing.assert_frame_equal(subject.saved("rank_sweep"), table)


def measured_together(pair, cells, moments, batch_tokens):
    policies = [Policy("base"), *(Policy(cell.name, cell.subspace(moments)) for cell in cells)]
    return measure(pair, EXAMPLES, policies, batch_tokens=batch_tokens)


def test_a_grid_gives_each_cell_the_bits_it_gets_alone(tiny_pair, moments, monkeypatch):
    """Encodings, batches, the base model's pass and the layers below are shared; numbers are not touched by that."""
    cells = Grid(ranks=[1, 2, 3, 4, 5, 6], layers=["0", "1", "2", "3"]).cells(moments)
    assert len(cells) == 24
    together = measured_together(tiny_pair, cells, moments, batch_tokens=100)
    monkeypatch.setattr(Policy, "first_layer", lambda policy, pair: 0)  # alone, each cell runs all layers
    base = measure(tiny_pair, EXAMPLES, [Policy("base")], batch_tokens=100)["base"]
    for cell in cells:
        one_layer = extract(tiny_pair, EXAMPLES, layers=[cell.first_layer], shards=2, progress=False)
        alone = measure(tiny_pair, EXAMPLES, [Policy("alone", cell.subspace(one_layer))], batch_tokens=100)["alone"]
        for name in base:
            np.testing.assert_allclose(together[cell.name][name], alone[name], rtol=0, atol=1e-6)
            np.testing.assert_array_equal(together["base"][name], base[name])
        same = measure(tiny_pair, EXAMPLES, [Policy("same", cell.subspace(moments))], batch_tokens=100)["same"]
        for name in base:
            np.testing.assert_array_equal(together[cell.name][name], same[name])
    assert len({values["kl"][0] for values in together.values()}) == 25


def test_a_grid_runs_the_base_model_once(tiny_pair, moments):
    cells = Grid(ranks=[1, 2, 4], layers=["2", "3"]).cells(moments)
    exact_starts(tiny_pair, {2, 3})  # tried once for a model, in passes of its own
    tokens = [0] * 4
    handles = []
    for layer, block in enumerate(tiny_pair.hf.model.layers):

        def count(_module, _args, output, layer=layer):
            tokens[layer] += output.shape[0] * output.shape[1]

        handles.append(block.mlp.register_forward_hook(count))
    try:
        measured_together(tiny_pair, cells, moments, batch_tokens=10_000)
    finally:
        for handle in handles:
            handle.remove()
    batch = len(EXAMPLES) * max(len(tiny_pair.encode(example).ids) for example in EXAMPLES)
    assert tokens == [batch, batch, 4 * batch, 7 * batch]
