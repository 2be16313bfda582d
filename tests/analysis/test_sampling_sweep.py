"""A grid of temperatures and top-p: what was sampled where, scores clustered by prompt, paired differences."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest

from spd_lens import tasks
from spd_lens.analysis.common.style import NULL_COLOR
from spd_lens.analysis.corpora import sampling_sweep as module
from spd_lens.analysis.corpora.sampling_sweep import (
    sampled,
    say,
    scored,
    sweep_differences,
    sweep_figure,
    sweep_frame,
)
from spd_lens.generation.corpus import Corpus, Record
from spd_lens.generation.generate import generate
from spd_lens.stats.intervals import clustered_mean, paired_difference
from spd_lens.subspaces.policy import Policy
from tests.helpers import refused

MATH = tasks.get("synthetic-math")
ITEMS = MATH.test(12, 0)


def corpus(rights):
    """For each item its samples: right or wrong."""
    records = []
    for item, own in zip(ITEMS, rights, strict=True):
        for sample, right in enumerate(own):
            text = f"#### {item.meta['answer'] if right else '-1'}"
            records.append(Record(item.id, item.prompt, text, (1,), (5, 6, 7), "eos", sample))
    return Corpus(records)


@pytest.fixture
def rights():
    rng = np.random.default_rng(0)
    return rng.random((12, 4)) < 0.3, rng.random((12, 4)) < 0.6


@pytest.fixture
def grid(rights):
    base, spd = rights
    return {
        ("base", 0.5, 1.0): corpus(base), ("base", 1.0, 1.0): corpus(base[:, :2]),
        ("spd", 0.5, 1.0): corpus(spd), ("spd", 1.0, 1.0): corpus(base[:, 2:]),
    }  # fmt: skip


def test_accuracy_is_clustered_by_prompt(grid, rights):
    frame = sweep_frame(grid, scored(grid, MATH, ITEMS), MATH)
    assert list(frame.columns[:3]) == ["policy", "temperature", "top_p"]
    own = frame[(frame.policy == "spd") & (frame.temperature == 0.5)].set_index("measure")
    wanted = clustered_mean(rights[1].T.astype(float))
    assert own.value["accuracy"] == pytest.approx(wanted.value)
    assert (own.low["accuracy"], own.high["accuracy"]) == pytest.approx((wanted.low, wanted.high))
    assert own.n["accuracy"] == 12
    assert own.value["any sample"] == rights[1].any(axis=1).mean()
    assert {"length", "loops", "after the answer"} <= set(own.index)
    assert len(frame.groupby(["policy", "temperature", "top_p"])) == 4


def test_differences_are_paired_at_the_same_point(grid, rights):
    found = sweep_differences(scored(grid, MATH, ITEMS)).set_index("temperature")
    base, spd = (r.mean(axis=1) for r in rights)
    wanted = paired_difference(base, spd)
    assert found.loc[0.5, ["value", "low", "high"]].tolist() == pytest.approx([wanted.value, wanted.low, wanted.high])
    assert set(found.policy) == {"spd"} and found.within_noise.tolist() == [False, True]
    sentence = say(sweep_frame(grid, scored(grid, MATH, ITEMS), MATH), found.reset_index())
    assert "1 of 2 settings" in sentence and "looks better than it is" in sentence


def test_a_task_that_cannot_score_still_gives_diagnostics():
    code = tasks.get("synthetic-code")
    items = code.test(12, 0)
    records = [Record(item.id, item.prompt, item.completion, (1,), (5, 6), "eos") for item in items]
    grid = {("base", 1.0, 1.0): Corpus(records), ("spd", 1.0, 1.0): Corpus(records)}
    scores = scored(grid, code, items)
    frame, differences = sweep_frame(grid, scores, code), sweep_differences(scores)
    assert "accuracy" not in set(frame.measure) and differences.empty
    assert "cannot be scored" in say(frame, differences)


def test_what_cannot_be_judged_is_left_out():
    items = tasks.get("synthetic-code").test(3, 0)
    records = [Record(item.id, item.prompt, item.completion, (1,), (5, 6), "eos") for item in items]
    weak = tasks.get(
        "synthetic-code", executor=lambda code, tests, setup: None if tests == items[1].meta["tests"] else True
    )
    assert scored({("base", 1.0, 1.0): Corpus(records)}, weak, items) == {
        ("base", 1.0, 1.0): {items[0].id: [1.0], items[2].id: [1.0]}
    }


def test_the_figure_has_every_point_and_a_grey_control(grid):
    grid = {**grid, **{("random", *setting[1:]): own for setting, own in grid.items() if setting[0] == "spd"}}
    frame = sweep_frame(grid, scored(grid, MATH, ITEMS), MATH)
    fig = sweep_figure(frame, "accuracy")
    assert [trace.name for trace in fig.data] == ["base", "spd", "random"]
    assert fig.data[2].line.color == NULL_COLOR and fig.data[2].line.dash == "dot"
    for trace in fig.data:
        rows = frame[(frame.policy == trace.name) & (frame.measure == "accuracy")].sort_values("temperature")
        assert list(trace.y) == list(rows.value)
        assert np.isfinite([*trace.y, *trace.error_y.array, *trace.error_y.arrayminus]).all()
    assert fig.layout.yaxis.title.text == module.MEASURES["accuracy"] and fig.layout.xaxis.title.text == "temperature"


def test_what_is_sampled_is_what_generate_gives(tiny_pair, tmp_path):
    policies, items = [Policy("base")], ITEMS[:2]
    options = {"max_new_tokens": 6, "seed": 3, "progress": False}
    found = sampled(
        tiny_pair, items, policies, temperatures=[0, 0.7], top_ps=[0.8, 1.0], samples=2, folder=tmp_path, **options
    )
    assert list(found) == [
        ("base", 0.0, 1.0),
        ("base", 0.7, 0.8),
        ("base", 0.7, 1.0),
    ]  # greedy once, whatever the top-p
    wanted = generate(tiny_pair, items, temperature=0.7, top_p=0.8, top_k=0, samples_per_prompt=2, **options)
    assert found["base", 0.7, 0.8].records == wanted.records
    assert len(found["base", 0.0, 1.0]) == 2 and len(list(tmp_path.glob("*.jsonl"))) == 3
    with refused("at least one"):
        sampled(tiny_pair, items, [], **options)


def test_the_command_writes_table_figures_and_sentences(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run.path, run)
    module.main([run], temperatures="0,1.0", top_ps="0.9", n=4, samples=2, adapter=True, quiet=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert "random minus base, paired by prompt" in shown and "tuned" in shown
    frame = pd.read_csv(run / "analysis" / "sampling_sweep.csv")
    assert set(frame.policy) == {"base", "projected", "random", "tuned"} and set(frame.temperature) == {0, 1}
    page = (run / "analysis" / "sampling_sweep.html").read_text()
    assert page.count("plotly-graph-div") >= 4
    with refused("temperatures", "'hot'"):
        module.main([run], temperatures="hot", quiet=True)
