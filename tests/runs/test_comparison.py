"""`spd-lens compare`: paired differences of two runs on the same items, against computations written out here."""

import math
from dataclasses import replace
from statistics import fmean

import pytest

import spd_lens as spd
from spd_lens.evaluation.results import EvalResult, ItemResult
from spd_lens.runs.comparison import compare, comparison_table
from spd_lens.runs.run_dir import Run


def make_run(path, scores, *, task="gsm8k", policy="spd", losses=None, seed=42, ids=None):
    """A run directory with one evaluation."""
    run = Run.open(path, spd.SPDConfig(task=task, seed=seed))
    ids = ids or [f"item-{i}" for i in range(len(scores))]
    losses = losses or [1.0 + 0.1 * i for i in range(len(scores))]
    items = [
        ItemResult(id, "q", "g", "c", "1", score, n_tokens=10, finish_reason="eos", aligned_loss=loss, kl=0.1)
        for id, score, loss in zip(ids, scores, losses, strict=True)
    ]
    EvalResult(policy, task, items).save(run.path / "eval" / task / f"{policy}.json")
    return run


def of(comparisons, measure):
    (found,) = [c for c in comparisons if c.measure == measure]
    return found


def test_accuracy_is_paired_and_tested_exactly(tmp_path):
    before = [0.0] * 30 + [1.0] * 20
    after = [1.0] * 12 + [0.0] * 18 + [1.0] * 18 + [0.0] * 2  # 12 gained, 2 lost
    found = of(compare([make_run(tmp_path / "a", before)], [make_run(tmp_path / "b", after)]), "accuracy")
    assert found.first.value == pytest.approx(20 / 50) and found.second.value == pytest.approx(30 / 50)
    assert found.difference.value == pytest.approx(0.2)
    # McNemar by hand: 14 disagreements, at most 2 on one side, both tails of a fair coin
    p = 2 * sum(math.comb(14, k) for k in range(3)) / 2**14
    assert found.test.p_value == pytest.approx(p)
    assert found.verdict == "higher"


def test_what_cannot_be_judged_is_no_part_of_accuracy(tmp_path):
    runs = [make_run(tmp_path / name, [0.0, 0.0, value]) for name, value in (("a", 0.0), ("b", 1.0))]
    path = runs[0].path / "eval" / "gsm8k" / "spd.json"
    result = EvalResult.load(path)
    replace(result, items=[replace(result.items[0], judged=False), *result.items[1:]]).save(path)
    found = compare(*([run] for run in runs))
    assert (of(found, "accuracy").second.value, of(found, "accuracy").second.n) == (0.5, 2)
    assert of(found, "aligned loss").first.n == 3


def test_losses_are_paired_by_id_whatever_their_order(tmp_path):
    losses = [0.5, 2.0, 1.0, 3.0, 0.1, 0.9, 1.7, 2.2, 0.3, 1.1]
    ids = [f"item-{i}" for i in range(10)]
    first = make_run(tmp_path / "a", [0.0] * 10, losses=losses)
    second = make_run(tmp_path / "b", [0.0] * 10, losses=[x - 0.2 for x in losses][::-1], ids=ids[::-1])
    found = of(compare([first], [second]), "aligned loss")
    assert found.difference.value == pytest.approx(-0.2)
    assert found.difference.high < -0.19, "constant after pairing; unpaired it would be lost in the spread"
    assert found.verdict == "lower"


def test_equal_runs_are_within_noise(tmp_path):
    scores = [1.0, 0.0] * 15
    found = compare([make_run(tmp_path / "a", scores)], [make_run(tmp_path / "b", scores)])
    assert {c.verdict for c in found} == {"within noise"}
    assert "completion loss" not in {c.measure for c in found}, "no item has it"


def test_seeds_are_clustered_by_item(tmp_path):
    one = [[1.0, 0.0] * 10, [0.0, 0.0] * 10, [1.0, 1.0] * 10]
    runs = [make_run(tmp_path / f"a{i}", scores, seed=i) for i, scores in enumerate(one)]
    other = [make_run(tmp_path / f"b{i}", [1.0] * 20, seed=i) for i in range(2)]
    found = of(compare(runs, other), "accuracy")
    assert found.difference.n == 20, "items are the units, not items times seeds"
    assert found.difference.value == pytest.approx(1.0 - fmean(map(fmean, one)))
    assert found.test is None and found.seeds[0].sd == pytest.approx(0.5)
    assert "Over seeds:" in comparison_table([found], "a", "b")


def test_other_items_are_refused(tmp_path):
    first = make_run(tmp_path / "a", [1.0, 0.0])
    second = make_run(tmp_path / "b", [1.0, 0.0], ids=["item-0", "item-7"])
    with pytest.raises(spd.SPDError, match="different items of gsm8k.*data_seed"):
        compare([first], [second])


def test_nothing_in_common_is_refused(tmp_path):
    with pytest.raises(spd.SPDError, match="no task and policy in common"):
        compare([make_run(tmp_path / "a", [1.0])], [make_run(tmp_path / "b", [1.0], policy="base")])


def test_the_command_prints_and_writes_the_table(tmp_path, capsys, monkeypatch):
    from spd_lens.cli.commands import main

    for name, scores in (("a", [0.0] * 20), ("b", [1.0] * 15 + [0.0] * 5)):
        make_run(tmp_path / name, scores)
    out = tmp_path / "table.md"
    monkeypatch.setattr(
        "sys.argv", ["spd-lens", "compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None)
    assert "accuracy" in capsys.readouterr().out
    assert "| gsm8k | spd | accuracy | 0.00 [0.00, 0.16] (n=20) | 0.75" in out.read_text()


def test_a_directory_that_is_no_run_is_one_sentence(tmp_path, capsys, monkeypatch):
    from spd_lens.cli.commands import main

    monkeypatch.setattr("sys.argv", ["spd-lens", "compare", str(tmp_path), str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "is not a run directory" in capsys.readouterr().err
