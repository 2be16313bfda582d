"""Outcomes side by side: items without a kind of token, sweeps that are older than an outcome, and what decides."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spd_lens import extract
from spd_lens.analysis.common import LOSS_FIELDS, by_item, deciding, in_words, known
from spd_lens.analysis.sweeps.engine import Sweep, measure, sweep
from spd_lens.analysis.sweeps.grid import Grid
from spd_lens.analysis.sweeps.recommend import overall, recommend
from spd_lens.analysis.sweeps.report import _outcomes
from spd_lens.analysis.sweeps.store import Measured, Store
from spd_lens.evaluation import OUTCOMES, SAYS, ForcedItem, other_texts, teacher_forced
from spd_lens.files import read_json, write_json
from spd_lens.subspaces.policy import Policy
from tests.helpers import EXAMPLES, refused

NAN = float("nan")
GRID = Grid(ranks=[2, 4], layers=["3"], n_random=3)


@pytest.fixture(scope="module")
def moments(tiny_pair):
    return extract(tiny_pair, EXAMPLES, layers="all", shards=2, progress=False)


@pytest.fixture(scope="module")
def measured(tiny_pair, moments):
    return sweep(tiny_pair, moments, EXAMPLES, GRID, progress=False)


def with_results(found, change, of_items=slice(None)):
    """A sweep that has measured results too: a loss of 1 on `of_items`, with `change` and small noise in each cell."""
    n = len(found.base["kl"])
    rng = np.random.default_rng(0)

    def values(own, shift):
        results = np.full(n, NAN)
        results[of_items] = (1 + shift + rng.normal(0, 0.01, n))[of_items]
        return {**own, "results_loss": results}

    cells = [
        Measured(one.cell, one.ranks, values(one.own, change), [values(each, 0.0) for each in one.random])
        for one in found.cells
    ]
    return Sweep(values(found.base, 0.0), cells)


def test_items_without_results_are_left_out_and_counted(measured):
    found = with_results(measured, -0.5, slice(0, 4))
    table = found.table()
    rows = table[table["measure"] == "results_loss"].set_index("cell")
    for one in found.cells:
        plain = (one.own["results_loss"] - found.base["results_loss"])[:4]
        random = np.mean([(each["results_loss"] - found.base["results_loss"])[:4].mean() for each in one.random])
        assert rows.loc[one.cell.name, "value"] == pytest.approx(plain.mean())
        assert rows.loc[one.cell.name, "random"] == pytest.approx(random)
        assert rows.loc[one.cell.name, "n_items"] == 4
    aligned = table[table["measure"] == "aligned_loss"]
    assert aligned["n_items"].eq(6).all() and aligned["matched"].isna().all()
    assert not table[["value", "low", "high", "random", "difference", "p_holm"]].isna().any(axis=None)


def test_the_recommendation_goes_by_results_where_there_are_any(measured):
    better = recommend(with_results(measured, -0.5).table(), kl_budget=100)
    assert better.cell is not None and "a results loss below that of random" in better.reason
    same = recommend(with_results(measured, 0.0).table(), kl_budget=100)
    assert same.cell is None and "for a lower results loss" in same.reason
    without = recommend(measured.table(), kl_budget=100)
    assert "results" not in without.reason and "aligned loss" in without.reason
    assert overall(with_results(measured, -0.5).table(), "results_loss").startswith("Results loss is lower than")


def test_a_sweep_of_before_is_shown_with_what_it_has(tiny_pair, moments, tmp_path):
    """A folder of a version that measured three outcomes goes on; a new cell's other outcomes have no base."""
    small = Grid(ranks=[2], layers=["3"])
    before = sweep(tiny_pair, moments, EXAMPLES, small, folder=tmp_path, progress=False)
    for path in (tmp_path / "base.json", next(tmp_path.glob("L*.json"))):
        record = read_json(path)
        for values in [record] if "kl" in record else [record["own"], *record["random"]]:
            assert set(values) >= {"aligned_loss", "kl", "completion_loss"}
            for name in set(values) - {"aligned_loss", "kl", "completion_loss"}:
                del values[name]
        write_json(path, record)
    after = sweep(tiny_pair, moments, EXAMPLES, GRID, folder=tmp_path, progress=False)
    assert after.measures == ["aligned_loss", "completion_loss", "kl"]
    first = next(one for one in after.cells if one.cell.rank == 2)
    for name in after.measures:
        np.testing.assert_array_equal(first.own[name], before.cells[0].own[name])


def test_what_an_item_lacks_is_kept_as_nothing(measured, tmp_path):
    found = with_results(measured, -0.5, slice(1, 5))
    store = Store(tmp_path, 6)
    store.base = found.base
    store.put(found.cells[0])
    assert "NaN" not in (tmp_path / "base.json").read_text(encoding="utf-8")
    again = Store(tmp_path, 6)
    np.testing.assert_array_equal(again.base["results_loss"], found.base["results_loss"])
    np.testing.assert_array_equal(
        again.get(found.cells[0].cell).own["results_loss"], found.cells[0].own["results_loss"]
    )


def test_kl_on_other_text_is_measured_on_the_texts(tiny_pair, moments, tmp_path):
    texts = other_texts(5)
    found = sweep(tiny_pair, moments, EXAMPLES, GRID, folder=tmp_path, texts=texts, progress=False)
    cell = found.cells[0]
    policy = Policy("it", cell.cell.subspace(moments))
    plain = [item.kl for item in teacher_forced(tiny_pair, texts, [policy], progress=False)["it"]]
    np.testing.assert_allclose(cell.own["other_text_kl"], plain, rtol=1e-5)
    rows = found.table().query("measure == 'other_text_kl'")
    assert rows["n_items"].eq(5).all() and rows["value"].iloc[0] == pytest.approx(np.mean(plain))
    assert sweep(tiny_pair, moments, EXAMPLES, GRID, folder=tmp_path, texts=texts, progress=False).measures[-1] == (
        "other_text_kl"
    )
    with refused("other_texts"):
        sweep(tiny_pair, moments, EXAMPLES, GRID, folder=tmp_path, progress=False)


class AnswersAlone:
    """A task that can ask for every item's last word alone, but for the first item."""

    def answer_only(self, item):
        if item.id == EXAMPLES[0].id:
            return None
        answer = item.completion[slice(*item.spans[-1])]
        return replace(item, prompt=f"{item.prompt} The answer alone.", completion=answer, spans=((0, len(answer)),))


def test_answers_are_asked_for_alone_where_that_is_wanted(tiny_pair, moments, tmp_path):
    task = AnswersAlone()
    policies = [Policy("base"), Policy("it", moments.subspace(2))]
    found = measure(tiny_pair, EXAMPLES, policies, answer_only=task)
    plain = teacher_forced(tiny_pair, [task.answer_only(e) for e in EXAMPLES[1:]], policies, progress=False)
    for name, items in plain.items():
        assert np.isnan(found[name]["answer_only_loss"][0])
        np.testing.assert_allclose(found[name]["answer_only_loss"][1:], [i.aligned_loss for i in items], rtol=1e-5)
    assert "answer_only_loss" not in measure(tiny_pair, EXAMPLES, policies)["it"]
    sweep(tiny_pair, moments, EXAMPLES, GRID, folder=tmp_path, answer_only=task, progress=False)
    with refused("answer_only"):
        sweep(tiny_pair, moments, EXAMPLES, GRID, folder=tmp_path, progress=False)


def test_outcomes_that_few_items_have_are_left_out():
    def item(number, results):
        return ForcedItem(str(number), 1.0, 2.0, 0.1, 0.5, results_loss=results)

    three = [item(i, 3.0 if i < 3 else None) for i in range(6)]
    four = [item(i, 3.0 if i < 4 else None) for i in range(6)]
    assert "results_loss" not in by_item(three) and "copies_loss" not in by_item(four)
    np.testing.assert_array_equal(by_item(four)["results_loss"], [3, 3, 3, 3, NAN, NAN])
    results = by_item(four)["results_loss"]
    assert known(np.stack([results, results]), results).tolist() == [[3.0] * 4] * 2
    assert set(by_item(three)) == {"aligned_loss", "completion_loss", "kl", "token_accuracy"}


def test_what_decides_and_what_is_said():
    assert (
        deciding(["aligned_loss", "kl"]) == "aligned_loss"
        and deciding(["aligned_loss", "results_loss"]) == "results_loss"
    )
    says = in_words(["results_loss", "aligned_loss"])
    assert says.startswith("The loss on the tokens that the task scores") and "copying is not enough" in says


def test_the_page_says_what_each_outcome_says():
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    for field in (*LOSS_FIELDS, "kl"):
        assert f"| {OUTCOMES[field]}" in page and SAYS[field] in page


def test_all_outcomes_stand_side_by_side(measured):
    import importlib

    table = with_results(measured, -0.5).table()
    drawn = importlib.import_module("spd_lens.analysis.sweeps.figures").outcome_maps(table)
    assert [note.text for note in drawn.layout.annotations] == ["aligned loss", "results loss", "completion loss"]
    for trace, field in zip(drawn.data, ("aligned_loss", "results_loss", "completion_loss"), strict=True):
        rows = table[table["measure"] == field].set_index("rank")["difference"]
        assert trace.z[0].tolist() == pytest.approx([rows[2], rows[4]])
    assert [column.header for column in _outcomes(table).columns] == [
        "cell", "aligned loss", "results loss", "completion loss", "KL from base"
    ]  # fmt: skip
