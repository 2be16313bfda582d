"""The lens engine, which captures at `hook_k` and `hook_v`, beside the twin engine on the same examples."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

import spd_lens as spd
from benchmarks import subjects
from benchmarks.measure import in_turn, ratios, settle
from benchmarks.table import Row
from spd_lens.errors import SPDError
from spd_lens.models import choose_backends

N_EXAMPLES, ROUNDS = {"smollm2": 9, "qwen2.5-0.5b-shape": 5}, 2
DTYPES = ("float32", "bfloat16")
GOAL = 2.0
"""The most that the lens engine may take, as a multiple of the twin engine's time."""


def rows(models: list[str], quick: bool) -> Iterator[Row]:
    """For each model, dtype and backend that the installed transformer-lens has: time and agreement of the moments."""
    for name in models:
        for dtype in DTYPES[:1] if quick else DTYPES:
            for backend in backends():
                yield from _engine(name, dtype, backend, quick)
                settle()


def backends() -> list[str]:
    """The backends that the installed transformer-lens has: both before version 4, from then on the bridge alone."""
    try:
        choose_backends("hooked")
    except SPDError:
        return ["bridge"]
    return ["hooked", "bridge"]


def _engine(name: str, dtype: str, backend: str, quick: bool) -> Iterator[Row]:
    rounds = 1 if quick else ROUNDS
    examples = subjects.task().calibration(4 if quick else N_EXAMPLES[name], seed=42)
    pair = subjects.subject(name, dtype, backend=backend).pair
    what = type(pair.lens).__name__  # built before it is timed

    def run(engine: str, part: list[spd.Example]) -> spd.GradientMoments:
        return spd.extract(pair, part, engine=engine, shards=1, progress=False)

    def warm_up() -> None:
        for engine in ("twin", "lens"):
            run(engine, examples[:1])

    ways = {engine: partial(lambda engine, _: run(engine, examples), engine) for engine in ("twin", "lens")}
    samples = in_turn(ways, rounds, warm_up, settled=True)
    n_tokens = sum(len(pair.encode(example).ids) for example in examples)
    rates = {way: statistics.median(n_tokens / s.seconds for s in found) for way, found in samples.items()}
    memory = {way: max(s.peak for s in found) / 2**20 for way, found in samples.items()}
    yield Row.of(
        "lens", name, dtype, f"lens engine on {what}: time over that of the twin engine",
        ratios(samples["twin"], samples["lens"]), target=GOAL, at_least=False,
        ours=f"{rates['lens']:.0f} tok/s", peer=f"{rates['twin']:.0f} tok/s",
        note=f"peak {memory['lens']:.0f} and {memory['twin']:.0f} MiB",
    )  # fmt: skip
    one, other = (samples[way][0].result.gradient for way in ("lens", "twin"))
    gaps = [((one[site] - other[site]).norm() / other[site].norm()).item() for site in one]
    yield Row(
        "lens", name, dtype, f"lens engine on {what}: relative difference of its moments from the twin engine's",
        max(gaps), min(gaps), max(gaps), 1e-4 if dtype == "float32" else None, at_least=False, unit="",
    )  # fmt: skip
