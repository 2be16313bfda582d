"""What a plan foresees beside what the stages took: two sizes of model, two of data, one and two processes.

Each process has one thread, and its processor time is what counts, so that other work on the machine shows little. As
in a study that has begun, measured seconds replace the assumed rate, stage by stage: those of the smallest units of the
first model. All others are foreseen from these. Beside them stand the main memory that prompts take, and the time of
the eigendecomposition of a joint block.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import spd_lens as spd
from benchmarks import subjects
from benchmarks.measure import in_fresh_process, timed
from benchmarks.table import Row
from spd_lens.study import HELD_PROMPT, HELD_TOKEN, Costs, Machine, StudyConfig, Unit, shape_of
from spd_lens.subspaces import BlockSpectrum

SIZES = {"extract": (24, 96), "generate": (32, 96), "finetune": (16, 48)}
"""Examples, prompts or texts of each stage: those of the calibration, and the larger set, which the first model has."""
NEW_TOKENS, DTYPE = 16, "bfloat16"
CORE = Machine("one CPU core in bfloat16", 0.125e12, 4e9, 0.5e-3, recomputes=False)
"""Half of what a plan assumes of two."""
PROMPTS, PROMPT_TOKENS = (10_000, 100_000), 48
WIDTH = 1024
"""Of the smaller of two joint blocks; the other one is twice as wide."""


class Took(NamedTuple):
    """One stage in one process, of which the plan foresees `planned` seconds at assumed rates."""

    seconds: float
    cpu: float
    planned: float


def rows(names: list[str], quick: bool) -> Iterator[Row]:
    """Stage by stage, processor time over the time that is foreseen; and bytes of main memory over those foreseen."""
    small = {stage: n[:1] for stage, n in SIZES.items()}
    rates: dict[str, float] = {}
    for i, name in enumerate(names):
        for (stage, n), took in in_fresh_process(stages, name, small if quick or i else SIZES).items():
            rates.setdefault(stage, took.cpu / took.planned)
            yield row(name, stage, n, [took], rates[stage])
    for stage in ("extract", "generate"):
        half, n = (partial(stages, names[0], {stage: (SIZES[stage][-1] // 2,)}), SIZES[stage][-1])
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            both = [future.result() for future in [pool.submit(half) for _ in range(2)]]
        yield row(names[0], stage, n, [took for found in both for took in found.values()], rates[stage])
    for n in PROMPTS[:1] if quick else PROMPTS:
        yield in_fresh_process(held, n)
    yield in_fresh_process(decomposed)


def row(name: str, stage: str, n: int, took: list[Took], rate: float) -> Row:
    """Seconds of a stage beside those foreseen; half of the work in each of two processes is done with the later one.

    Args:
        name: The model.
        stage: The stage.
        n: Examples, prompts or texts in all.
        took: What each process took.
        rate: Measured seconds for each second that a plan foresees at assumed rates.
    """
    measured, foreseen = max(one.cpu for one in took), max(one.planned for one in took) * rate
    noun = {"extract": "examples", "generate": "prompts", "finetune": "texts"}[stage]
    processes = "one process" if len(took) == 1 else f"{len(took)} processes at once, a share of them each"
    return Row.of(
        "scaling", name, DTYPE, f"{stage}, {n} {noun}, {processes}", [measured / foreseen],
        ours=f"{measured:.1f} s", peer=f"{foreseen:.1f} s",
        note=f"{max(one.seconds for one in took):.1f} s by the clock, {max(one.planned for one in took):.1f} s at the "
        "assumed rate",
    )  # fmt: skip


def stages(name: str, sizes: dict[str, tuple[int, ...]]) -> dict[tuple[str, int], Took]:
    """The stages at each of their sizes, after a short one that is not counted."""
    torch.set_num_threads(1)
    subject = subjects.subject(name, DTYPE, device="cpu")
    pair = subject.pair
    found: dict[tuple[str, int], Took] = {}
    with tempfile.TemporaryDirectory() as folder:
        for stage, numbers in sizes.items():
            for n in (1, *numbers):
                call, tokens = _call(pair, stage, n, folder)
                began = time.thread_time()  # without that of the thread which watches the memory
                seconds = timed(call, settled=False).seconds
                if n > 1:
                    cpu = time.thread_time() - began
                    found[stage, n] = Took(seconds, cpu, _planned(pair, stage, n, tokens))
    return found


def _call(pair: spd.ModelPair, stage: str, n: int, folder: str) -> tuple[Callable[[], Any], int]:
    """What a stage does with `n` texts, and how many tokens they have."""
    if stage == "finetune":
        corpus = subjects.made_corpus(pair, n)
        out = Path(tempfile.mkdtemp(dir=folder)) / "adapter"
        tokens = sum(record.n_prompt_tokens + record.n_completion_tokens for record in corpus)
        return partial(spd.finetune, pair, corpus, out=out, epochs=1, progress=False), tokens
    examples = subjects.task().calibration(n, seed=42)
    if stage == "extract":
        tokens = sum(len(pair.encode(example, "aligned").ids) for example in examples)
        return partial(spd.extract, pair, examples, engine="twin", progress=False), tokens
    tokens = sum(len(pair.prompt_ids(example)) + NEW_TOKENS for example in examples)
    # greedy: under random weights most of the vocabulary is in a nucleus, and finding it takes half of a step
    how: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "batch_size": 32, "temperature": 0.0, "progress": False}
    return partial(spd.generate, pair, examples, **how), tokens


def _planned(pair: spd.ModelPair, stage: str, n: int, tokens: int) -> float:
    """Seconds that a plan foresees for so many tokens, at assumed rates."""
    config = StudyConfig.make(
        {
            "sources": [subjects.task().name], "methods": ["spd"],
            "settings": {
                "dtype": DTYPE, "device": "cpu", "engine": "twin", "n_calibration": n, "n_train": n, "epochs": 1,
                "max_new_tokens": NEW_TOKENS, "generation_batch_size": 32,
            },
        }
    )  # fmt: skip
    cost = Costs(config, shape_of(pair.name, pair.hf), CORE).of(Unit(stage, config.sources[0], "spd", 42))
    return cost.seconds * tokens / cost.tokens


def held(n: int) -> Row:
    """Main memory of `n` prompts and their records, with a corpus file, beside a model that has next to nothing."""
    torch.set_num_threads(1)
    pair = subjects.of_numbers(8, 1, 1)
    texts = [subjects.numbers(PROMPT_TOKENS, i) for i in range(n)]
    call = partial(spd.generate, pair, texts, max_new_tokens=1, batch_size=256, progress=False)
    call.func(pair, texts[:10], max_new_tokens=1, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        sample = timed(partial(call, path=Path(folder) / "corpus.jsonl"))
    tokens = sum(record.n_prompt_tokens + record.n_completion_tokens for record in sample.result) / n
    foreseen = HELD_PROMPT + HELD_TOKEN * tokens
    return Row.of(
        "scaling", "tiny", "float32", f"generate, {n:,} prompts of {tokens:.0f} tokens: main memory for each",
        [sample.peak / n / foreseen], ours=f"{sample.peak / n / 1e3:.2f} kB", peer=f"{foreseen / 1e3:.2f} kB",
    )  # fmt: skip


def decomposed() -> Row:
    """Seconds of the eigendecomposition of a joint block, beside eight times those of a block half as wide."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    seconds = []
    for width in (WIDTH, 2 * WIDTH):
        rows = torch.randn(width, width, dtype=torch.float64)
        began = time.process_time()
        BlockSpectrum.of(rows.T @ rows)
        seconds.append(time.process_time() - began)
    foreseen = 8 * seconds[0]
    return Row.of(
        "scaling", "", "float64", f"eigendecomposition of a joint block, width {2 * WIDTH:,}, by the cube of its width",
        [seconds[1] / foreseen], ours=f"{seconds[1]:.1f} s", peer=f"{foreseen:.1f} s",
    )  # fmt: skip
