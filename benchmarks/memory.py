"""Memory: what a lens model adds to its twin, what letting go of it gives back, and the peak of each stage."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformer_lens  # noqa: F401  (its own size is not that of a model)

import spd_lens as spd
from benchmarks import subjects
from benchmarks.lens import backends
from benchmarks.measure import held, settle, timed
from benchmarks.table import Row
from spd_lens.evaluation import teacher_forced
from spd_lens.models import own_memory
from spd_lens.subspaces import Policy

DTYPES = ("float32", "bfloat16")
N_EXAMPLES, NEW_TOKENS = 8, 32
PAIR_GOAL, DROP_GOAL = 1.1, 0.9


def rows(models: list[str], quick: bool) -> Iterator[Row]:
    """Rows of each model, dtype and backend."""
    for name in models:
        for dtype in DTYPES[-1:] if quick else DTYPES:
            for backend in backends():
                yield from _pair(name, dtype, backend)
                settle()
            yield from _stages(name, dtype)
            settle()


def _pair(name: str, dtype: str, backend: str) -> Iterator[Row]:
    """Both models after each has been used, then an edit of every weight of the lens model, then without it."""
    pair = subjects.subject(name, dtype, backend=backend).pair
    own_memory(pair.hf)
    weights = _size(pair)
    _use(pair, "twin")
    alone = held()
    pair.check()  # builds the lens model
    what = type(pair.lens).__name__
    _use(pair, "lens")
    added = held() - alone
    yield _row(
        name, dtype, f"weights and {what}: memory of the pair over that of the twin", (weights + added) / weights,
        PAIR_GOAL, ours=_mib(weights + added), peer=_mib(weights),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in pair.lens.parameters():
            parameter.mul_(1)
    before = held()
    pair.drop_lens()
    back = before - held()
    yield _row(
        name, dtype, f"drop_lens() of a {what} with all its weights edited: given back, over the twin's weights",
        back / weights, DROP_GOAL, at_least=True, ours=_mib(back), peer=_mib(weights),
    )  # fmt: skip


def _use(pair: spd.ModelPair, engine: str) -> None:
    spd.extract(pair, subjects.task().calibration(1, seed=0), engine=engine, progress=False)


def _stages(name: str, dtype: str) -> Iterator[Row]:
    """Peak of each stage above what was held before it, over the weights."""
    pair = subjects.subject(name, dtype).pair
    own_memory(pair.hf)
    examples = subjects.task().calibration(N_EXAMPLES, seed=42)
    moments = spd.extract(pair, examples, engine="twin", progress=False)
    subspace = moments.subspace()
    policies = [Policy("base"), Policy("projected", subspace)]

    def generated() -> spd.Corpus:
        return spd.generate(pair, examples, subspace=subspace, max_new_tokens=NEW_TOKENS, progress=False)

    corpus = generated()
    with tempfile.TemporaryDirectory() as folder:
        stages: dict[str, Callable[[], Any]] = {
            f"extract, {N_EXAMPLES} examples": lambda: spd.extract(pair, examples, engine="twin", progress=False),
            f"generate, {N_EXAMPLES} prompts × {NEW_TOKENS} tokens": generated,
            f"finetune, {N_EXAMPLES} texts a step": lambda: spd.finetune(
                pair, corpus, out=Path(folder) / "adapter", epochs=1, progress=False
            ),
            f"teacher_forced, {N_EXAMPLES} items": lambda: teacher_forced(pair, examples, policies, progress=False),
        }
        for stage, call in stages.items():
            peak = timed(call).peak
            yield _row(
                name, dtype, f"{stage}: peak above the weights, over the weights", peak / _size(pair),
                ours=_mib(peak), peer=_mib(_size(pair)),
            )  # fmt: skip


def _size(pair: spd.ModelPair) -> int:
    return sum(parameter.nbytes for parameter in pair.hf.parameters())


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _row(
    name: str, dtype: str, what: str, value: float, target: float | None = None, *, at_least: bool = False,
    ours: str, peer: str,
) -> Row:  # fmt: skip
    return Row.of("memory", name, dtype, what, [value], target=target, at_least=at_least, ours=ours, peer=peer)
