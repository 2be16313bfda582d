"""A grid of ranks × layers against one cell of it, and several policies against each by itself: what is shared."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import numpy as np

import spd_lens as spd
from benchmarks import subjects
from benchmarks.measure import in_turn, ratios, settle
from benchmarks.table import Row
from spd_lens.analysis.sweeps import Grid, GridCell, measure
from spd_lens.evaluation import ForcedItem, ForcedPasses, teacher_forced
from spd_lens.subspaces import Policy

RANKS = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4]
N_EXAMPLES, N_ITEMS, N_RANDOM, ROUNDS = 8, 4, 3, 2
"""A sixth of what a sweep takes (50 calibration examples, 24 held-out items): the ratio is the same."""
DTYPES = {"smollm2": ("float32", "bfloat16"), "qwen2.5-0.5b-shape": ("bfloat16",)}
GOAL = 3.0

Values = Mapping[str, np.ndarray]


def rows(models: list[str], quick: bool) -> Iterator[Row]:
    """For each model and dtype: what the grid and the policies of a run cost, and how far numbers are from those of
    passes that share nothing."""
    for name in models:
        for dtype in DTYPES[name][-1:] if quick else DTYPES[name]:
            yield from _policies(name, dtype, quick)
            settle()
            yield from _grid(name, dtype, quick)
            settle()


class _WholePasses(ForcedPasses):
    """Passes that all run all layers."""

    def expect(self, layers: Iterable[int]) -> None:
        """Nothing is shared."""


def _policies(name: str, dtype: str, quick: bool) -> Iterator[Row]:
    """The teacher-forced effects of a run before it trains: the base, the projection, and random ones beside it."""
    pair = subjects.subject(name, dtype).pair
    n_items, rounds = (2, 1) if quick else (2 * N_ITEMS, ROUNDS)
    task = subjects.task()
    items = task.test(n_items, seed=42)
    subspace = spd.extract(pair, task.calibration(4, seed=42), engine="twin", progress=False).subspace()
    policies = [Policy("base"), Policy("projected", subspace)]
    policies += [Policy(f"random-{i}", subspace.random_like(i)) for i in range(N_RANDOM)]

    def shared(_: int) -> dict[str, list[ForcedItem]]:
        return teacher_forced(pair, items, policies, progress=False)

    def whole(_: int) -> dict[str, list[ForcedItem]]:
        return teacher_forced(pair, items, policies, passes=_WholePasses(pair), progress=False)

    samples = in_turn({"shared": shared, "whole": whole}, rounds, warm_up=lambda: shared(0))
    _, passing = multiplications(pair, [], items)
    first = policies[1].first_layer(pair)
    yield Row.of(
        "sweep", name, dtype, f"effects of base, projection and {N_RANDOM} random ones: every pass through all layers",
        ratios(samples["shared"], samples["whole"]), target=None,
        bound=f"{len(policies) * passing(0) / (passing(0) + (len(policies) - 1) * passing(first)):.2f}",
        ours=f"{statistics.median(s.seconds for s in samples['shared']):.1f} s",
        peer=f"{statistics.median(s.seconds for s in samples['whole']):.1f} s",
        note=f"{n_items} held-out items, first projected layer {first} of {pair.n_layers}",
    )  # fmt: skip
    same = float(samples["shared"][0].result == samples["whole"][0].result)
    yield Row.of("sweep", name, dtype, "the same bits as passes through all layers", [same], target=1.0)


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
        return measure(pair, items, policies)

    def alone(layer: int) -> dict[str, Values]:
        moments = spd.extract(pair, examples, layers=[layer], engine="twin", progress=False)
        cell = _cell(grid, moments, layer)
        policies = [Policy("base"), Policy(cell.name, cell.subspace(moments))]
        return measure(pair, items, policies, passes=_WholePasses(pair))

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
        bound=bound(pair, examples, items, layers),
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


def bound(pair: spd.ModelPair, examples: list[spd.Example], items: list[spd.Example], layers: list[int]) -> str:
    """The ratio of multiplications with weights, if everything that can be shared is and all else takes no time; and
    the same if the grid needed no logits of held-out items."""
    extraction, passing = multiplications(pair, examples, items)
    one = statistics.mean(extraction(layer) + 2 * passing(0) for layer in layers)

    def grid(passing: Callable[[int], float]) -> float:
        return (extraction(min(layers)) + passing(0) + sum(len(RANKS) * passing(layer) for layer in layers)) / one

    _, unembedded = multiplications(pair, examples, items, logits=False)
    return f"{grid(passing):.2f} by multiplications, {grid(unembedded):.2f} without any logits"


def multiplications(
    pair: spd.ModelPair, examples: list[spd.Example], items: list[spd.Example], *, logits: bool = True
) -> tuple[Callable[[int], float], Callable[[int], float]]:
    """Multiplications with weights, by the first layer: of an extraction, and of a pass over held-out items.

    A pass from layer `l` on is one of every position through the blocks above, since a projection of K and V changes
    them all, and of the completion's positions through the unembedding.
    """
    text = pair.hf.config.get_text_config()
    unembedding = text.vocab_size * text.hidden_size
    per_block = (sum(p.numel() for p in pair.hf.parameters()) - unembedding) / pair.n_layers
    n_tokens = sum(len(pair.encode(e).ids) for e in examples)
    encoded = [pair.encode(item) for item in items]
    n_item_tokens = sum(len(e.ids) for e in encoded)
    n_targets = sum(len(e.ids) - e.completion_start for e in encoded) if logits else 0

    def extraction(first: int) -> float:
        return n_tokens * per_block * (pair.n_layers + (pair.n_layers - 1 - first))

    def passing(first: int) -> float:
        return n_item_tokens * per_block * (pair.n_layers - first) + n_targets * unembedding

    return extraction, passing
