"""How time and peak memory of each stage grow with examples, tokens, layers, width and rank: exponents of power laws.

The models have random weights in the shape of Llama, so small that a point takes seconds; one thread computes, and its
processor time is what counts. An exponent is the slope of a straight line through the logarithms of the
`N_FITTED` largest sizes, where what does not grow (starting a pass, writing files) weighs least.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import spd_lens as spd
from benchmarks import subjects
from benchmarks.measure import in_fresh_process, timed
from benchmarks.table import Row
from spd_lens.evaluation import teacher_forced
from spd_lens.subspaces import Policy

N_FITTED = 3
D_HEAD, COMPLETION, NEW_TOKENS, BATCH = 64, 16, 16, 8
"""Width of a head; tokens of a gold completion, and of a generated one; texts in a step, and prompts at a time."""


@dataclass(frozen=True)
class Size:
    """One point: how much there is of everything."""

    examples: int = 16
    tokens: int = 128
    """Of each text, its completion included."""
    layers: int = 4
    width: int = 256
    rank: int = 8
    """Directions of a head that are kept, and the rank of LoRA."""


AXES: Mapping[str, Sequence[int]] = {
    "examples": (16, 32, 64, 128),
    "tokens": (128, 256, 512, 1024),
    "layers": (4, 8, 16, 32),
    "width": (128, 256, 512, 768),
    "rank": (4, 8, 16, 32),
}
STAGES = ("extract", "generate", "finetune", "teacher_forced")
EXPECTED: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "examples": {stage: ("1", "0") for stage in STAGES},
    "tokens": {
        "extract": ("1 to 2", "0"), "generate": ("0 to 2", "0 to 1"), "finetune": ("1 to 2", "1"),
        "teacher_forced": ("1 to 2", "0"),
    },
    "layers": {"extract": ("1", "1"), "generate": ("1", "1"), "finetune": ("1", "1"), "teacher_forced": ("1", "0")},
    "width": {
        "extract": ("1 to 2", "1 to 2"), "generate": ("1 to 2", "1 to 2"), "finetune": ("1 to 2", "1"),
        "teacher_forced": ("1 to 2", "1"),
    },
    "rank": {stage: ("0", "0") for stage in STAGES},
}  # fmt: skip
"""Exponents of time and of peak memory, by axis and stage; docs/scaling.md gives the reasons."""
CONSTANT = 0.1
"""The largest exponent that counts as none."""


def rows(models: list[str], quick: bool) -> Iterator[Row]:
    """For each axis and stage the exponent of its time and of its peak memory, with the points."""
    for axis, sizes in AXES.items():
        found = in_fresh_process(measured, axis, sizes[:2] if quick else sizes)
        for stage in STAGES:
            yield from rows_of(axis, stage, found[stage])


def rows_of(axis: str, stage: str, points: Sequence[tuple[int, float, int]]) -> Iterator[Row]:
    """The rows of one curve; each point is a size, processor seconds, and bytes of memory at the peak."""
    for n, (what, unit) in enumerate((("time", "s"), ("peak memory", "MiB"))):
        curve = [(size, values[n] if n == 0 else values[n] / 2**20) for size, *values in points]
        steady = what == "peak memory" and axis == "examples"
        yield Row.of(
            "curves", "random Llama shapes", "float32", f"{stage}: {what} by {axis}", [exponent(curve)],
            target=CONSTANT if steady else None, at_least=False, unit="exponent", peer=EXPECTED[axis][stage][n],
            ours=", ".join(f"{value:.3g}" for _, value in curve) + f" {unit}", points=curve,
        )  # fmt: skip


def exponent(curve: Sequence[tuple[float, float]]) -> float:
    """Of the power law through the largest sizes; 0 where nothing was measured."""
    logs = [(math.log(size), math.log(max(value, 1e-9))) for size, value in sorted(curve)[-N_FITTED:]]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def measured(axis: str, sizes: Sequence[int]) -> dict[str, list[tuple[int, float, int]]]:
    """Size, processor seconds and peak bytes of every stage along one axis, each after a short call."""
    torch.set_num_threads(1)
    found: dict[str, list[tuple[int, float, int]]] = {stage: [] for stage in STAGES}
    for size in sizes:
        point = replace(Size(), **{axis: size})
        heads = point.width // D_HEAD
        pair = subjects.of_numbers(point.width, point.layers, heads, heads // 2)
        with tempfile.TemporaryDirectory() as folder:
            small = stages(pair, replace(point, examples=2), Path(folder) / "small")
            for stage, call in stages(pair, point, Path(folder) / "whole").items():
                small[stage]()
                begin = time.thread_time()  # without that of the thread which watches the memory
                peak = timed(call).peak
                found[stage].append((size, time.thread_time() - begin, peak))
    return found


def stages(pair: spd.ModelPair, size: Size, folder: Path) -> dict[str, Callable[[], Any]]:
    """What each stage does at a size."""
    prompt = size.tokens - COMPLETION
    examples = [
        spd.Example(subjects.numbers(prompt, i), subjects.numbers(COMPLETION, i + 1), ((0, 1),), id=str(i))
        for i in range(size.examples)
    ]
    subspace = spd.extract(pair, examples[:2], engine="twin", progress=False).subspace(size.rank)
    corpus = subjects.gold_corpus(pair, examples)
    return {
        "extract": lambda: spd.extract(pair, examples, engine="twin", progress=False).subspace(size.rank),
        "generate": lambda: spd.generate(
            pair, examples, subspace=subspace, max_new_tokens=NEW_TOKENS, batch_size=BATCH, temperature=0.0,
            progress=False,
        ),
        "finetune": lambda: spd.finetune(
            pair, corpus, out=folder, epochs=1, batch_size=BATCH, rank=size.rank, resume=False, progress=False
        ),
        "teacher_forced": lambda: teacher_forced(
            pair, examples, [Policy("base"), Policy("projected", subspace)], progress=False
        ),
    }  # fmt: skip
