"""A grid of ranks × layers against one cell of it: how much of the work is shared."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

import spd_lens as spd
from benchmarks import subjects
from benchmarks.measure import in_turn, settle
from benchmarks.table import Row
from spd_lens.analysis.sweeps import Grid, GridCell, measure
from spd_lens.evaluation import exact_prefix
from spd_lens.subspaces import Policy

RANKS = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4]
N_EXAMPLES, N_ITEMS, ROUNDS = 8, 4, 2
"""A sixth of what a sweep takes (50 calibration examples, 24 held-out items): the ratio is the same."""
DTYPES = {"smollm2": ("float32", "bfloat16"), "qwen2.5-0.5b-shape": ("bfloat16",)}
GOAL = 3.0

Values = Mapping[str, np.ndarray]


def rows(models: list[str], quick: bool) -> Iterator[Row]:
    """For each model and dtype: what the grid costs, and how far its numbers are from those of cells alone."""
    for name in models:
        for dtype in DTYPES[name][-1:] if quick else DTYPES[name]:
            yield from _grid(name, dtype, quick)
            settle()


def _grid(name: str, dtype: str, quick: bool) -> Iterator[Row]:
    pair = subjects.subject(name, dtype).pair
    n_examples, n_items, rounds = (4, 2, 1) if quick else (N_EXAMPLES, N_ITEMS, ROUNDS)
    task = subjects.task()
    examples, items = task.calibration(n_examples, seed=42), task.test(n_items, seed=42)
    layers = quarters(pair.n_layers)
    grid = Grid(ranks=list(RANKS), layers=[str(layer) for layer in layers])

    def together(_: int) -> dict[str, Values]:
        moments = spd.extract(pair, examples, layers=layers, engine="twin", progress=False)
        cells = grid.cells(moments)
        policies = [Policy("base"), *(Policy(cell.name, cell.subspace(moments)) for cell in cells)]
        prefix = exact_prefix(pair, items, {cell.first_layer for cell in cells})
        return measure(pair, items, policies, prefix=prefix)

    def alone(layer: int) -> dict[str, Values]:
        moments = spd.extract(pair, examples, layers=[layer], engine="twin", progress=False)
        cell = _cell(grid, moments, layer)
        return measure(pair, items, [Policy("base"), Policy(cell.name, cell.subspace(moments))])

    ways: dict[str, Callable[[int], dict[str, Values]]] = {"grid": together}
    for layer in layers:
        ways[str(layer)] = partial(lambda layer, _: alone(layer), layer)
    samples = in_turn(ways, rounds, warm_up=lambda: alone(layers[0]))
    cells = [statistics.mean(samples[str(layer)][r].seconds for layer in layers) for r in range(rounds)]
    each = [sample.seconds / cell for sample, cell in zip(samples["grid"], cells, strict=True)]
    n_cells = len(samples["grid"][0].result) - 1
    what = f"{len(RANKS)} ranks × {len(layers)} layers against one cell alone (mean of those layers)"
    yield Row.of(
        "sweep", name, dtype, what, each, target=GOAL, at_least=False,
        bound=f"{bound(pair, examples, items, layers):.2f} by multiplications",
        ours=f"{statistics.median(s.seconds for s in samples['grid']):.1f} s for {n_cells} cells",
        peer=f"{statistics.median(cells):.1f} s a cell",
        note=f"{n_examples} examples, {n_items} held-out items; cells one by one would be {n_cells:.0f}",
    )  # fmt: skip
    gap = max(
        float(np.abs(values - samples["grid"][0].result[cell][measured]).max())
        for layer in layers
        for cell, found in samples[str(layer)][0].result.items()
        for measured, values in found.items()
    )
    yield Row.of(
        "sweep", name, dtype, "largest difference of an item's loss or KL between grid and cell alone", [gap],
        target=1e-5 if dtype == "float32" else None, at_least=False, unit="nats",
    )  # fmt: skip


def quarters(n_layers: int) -> list[int]:
    """The paper's two layers, last and middle, and those halfway between."""
    return [n_layers * part // 4 - 1 for part in (4, 3, 2, 1)]


def _cell(grid: Grid, moments: spd.GradientMoments, layer: int) -> GridCell:
    """The cell of middling rank at one layer, out of moments of that layer alone."""
    return grid.model_copy(update={"layers": [str(layer)], "ranks": [RANKS[3]]}).cells(moments)[0]


def bound(pair: spd.ModelPair, examples: list[spd.Example], items: list[spd.Example], layers: list[int]) -> float:
    """The ratio of multiplications with weights, if everything that can be shared is and all else takes no time.

    A pass from layer `l` on is one of every position through the blocks above, since a projection of K and V changes
    them all, and of the completion's positions through the unembedding.
    """
    text = pair.hf.config.get_text_config()
    unembedding = text.vocab_size * text.hidden_size
    per_block = (sum(p.numel() for p in pair.hf.parameters()) - unembedding) / pair.n_layers
    n_tokens = sum(len(pair.encode(e).ids) for e in examples)
    encoded = [pair.encode(item) for item in items]
    n_item_tokens = sum(len(e.ids) for e in encoded)
    n_targets = sum(len(e.ids) - e.completion_start for e in encoded)

    def extraction(first: int) -> float:
        return n_tokens * per_block * (pair.n_layers + (pair.n_layers - 1 - first))

    def passing(first: int) -> float:
        return n_item_tokens * per_block * (pair.n_layers - first) + n_targets * unembedding

    one = statistics.mean(extraction(layer) + 2 * passing(0) for layer in layers)
    grid = extraction(min(layers)) + passing(0) + sum(len(RANKS) * passing(layer) for layer in layers)
    return grid / one
