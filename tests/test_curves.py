"""Scaling curves: exponents, what is expected of them, and that each stage can be measured at every size."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest

from benchmarks import curves, subjects
from scripts.curves_figure import figure


def test_an_exponent_is_the_slope_through_the_logarithms_of_the_largest_sizes():
    rng = np.random.default_rng(0)
    sizes = np.array([8, 16, 32, 64, 128])
    values = 0.3 * sizes**1.4 * rng.uniform(0.8, 1.2, len(sizes))
    wanted = np.polyfit(np.log(sizes[-3:]), np.log(values[-3:]), 1)[0]
    shuffled = rng.permutation(len(sizes))
    assert curves.exponent(list(zip(sizes[shuffled], values[shuffled], strict=True))) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("stage", "peaks", "met"), [("extract", (50, 51, 50), True), ("generate", (50, 60, 72), False)]
)
def test_memory_that_grows_with_the_examples_misses_its_goal(stage, peaks, met):
    points = [(n, 0.5 * n, peak * 2**20) for n, peak in zip((8, 16, 32), peaks, strict=True)]
    time, memory = curves.rows_of("examples", stage, points)
    assert time.value == pytest.approx(1.0) and time.target is None and time.points == [(8, 4), (16, 8), (32, 16)]
    assert memory.met is met and [size for size, _ in memory.points] == [8, 16, 32]


def test_every_curve_has_what_is_expected_of_it():
    assert set(curves.EXPECTED) == set(curves.AXES)
    assert all(set(stages) == set(curves.STAGES) for stages in curves.EXPECTED.values())


def test_each_stage_has_as_many_tokens_as_its_size_says(tmp_path):
    size = curves.Size(examples=2, tokens=24, layers=1, width=128, rank=2)
    pair = subjects.of_numbers(size.width, size.layers, 2, 1)
    calls = curves.stages(pair, size, tmp_path / "adapter")
    assert set(calls) == set(curves.STAGES)
    corpus = calls["generate"]()
    assert [record.n_prompt_tokens for record in corpus] == [size.tokens - curves.COMPLETION] * 2
    assert set(calls["extract"]().ranks.values()) == {(2,)}


def test_the_picture_has_a_line_for_each_stage_in_each_of_its_panels():
    points = [(8, 4.0, 2**20), (16, 8.0, 2**21), (32, 16.0, 2**22)]
    rows = [
        asdict(row) for axis in curves.AXES for stage in curves.STAGES for row in curves.rows_of(axis, stage, points)
    ]
    lines = figure(json.loads(json.dumps(rows))).data
    panels = Counter((line.xaxis, line.yaxis) for line in lines)
    assert len(panels) == 2 * len(curves.AXES) and set(panels.values()) == {len(curves.STAGES)}
    assert {line.y for line in lines if line.yaxis == "y"} == {(4.0, 8.0, 16.0)}
    assert {line.y for line in lines if line.xaxis == "x6"} == {(1.0, 2.0, 4.0)}
