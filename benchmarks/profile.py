"""Where the time of extraction, generation and training goes, by kind of operation, as torch's profiler counts it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import spd_lens as spd
from benchmarks import subjects, training
from benchmarks.measure import settle
from benchmarks.table import Row

DTYPES = ("float32", "bfloat16")
KINDS = {
    "attention": ("attention", "flash", "softmax", "bmm", "fmha"),
    "products": ("mm", "linear", "gemm", "cutlass", "gemv"),
}
"""Words in an operation's or a kernel's name; the first kind with a match has it. Products of batches are attention's:
nothing else multiplies batches here."""


def rows(models: list[str], quick: bool) -> Iterator[Row]:
    """For each model, dtype and stage the share of the matrix products with weights; the rest is in the note."""
    for name in models:
        for dtype in DTYPES[-1:] if quick else DTYPES:
            subject = subjects.subject(name, dtype)
            for stage, call in _stages(subject, 4 if quick else 8).items():
                call()  # a warm-up
                yield _shares(subject, stage, call)
            settle()


def _stages(subject: subjects.Subject, n: int) -> dict[str, Callable[[], Any]]:
    pair = subject.pair
    examples = subjects.task().calibration(n, seed=42)
    subspace = spd.extract(pair, examples[:4], engine="twin", progress=False).subspace()
    corpus = subjects.made_corpus(pair, n)
    return {
        f"extraction, {n} examples": lambda: spd.extract(pair, examples, engine="twin", shards=1, progress=False),
        f"generation, {n} prompts × 32 tokens": partial(
            spd.generate, pair, examples, subspace=subspace, temperature=0.0, max_new_tokens=32, progress=False
        ),
        f"training, {n} texts in batches of {training.BATCH}": lambda: training.ours(pair, corpus),
    }


def _shares(subject: subjects.Subject, stage: str, call: Callable[[], Any]) -> Row:
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        start = time.perf_counter()  # the profiler's own beginning and end are not the stage's
        call()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    spent = dict.fromkeys((*KINDS, "other operations"), 0.0)
    for event in found.key_averages():
        spent[kind_of(event.key)] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
    # what runs beside the operations: Python, and on CUDA whatever leaves the device idle
    shares = {kind: value / seconds for kind, value in spent.items()}
    shares["between operations"] = max(0.0, 1 - sum(shares.values()))
    note = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items() if kind != "products")
    return Row.of(
        "profile", subject.name, subject.dtype, f"{stage}: products with weights", [shares["products"]],
        unit="of the time", note=note,
    )  # fmt: skip


def kind_of(operation: str) -> str:
    """The kind that an operation of this name counts as."""
    return next((kind for kind, words in KINDS.items() if any(w in operation for w in words)), "other operations")
