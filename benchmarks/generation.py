"""Generation under a projection: slots on the folded twin against the ways with hooks, and against plain `generate`."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import spd_lens as spd
from benchmarks import subjects
from benchmarks.bounds import generation_seconds
from benchmarks.completions import (
    arrival_order,
    hf_generate,
    in_slots,
    jobs_of,
    new_tokens,
    prompt_range,
    same_tokens_row,
    speed_row,
)
from benchmarks.measure import Sample, in_turn, settle, timed
from benchmarks.table import Row
from spd_lens.generation import Decoding, Job, Sampling, stop_tokens
from spd_lens.subspaces import projected, projected_twin

BATCH = 16
PROMPT_TOKENS = 64
NEW_TOKENS = 48
GREEDY = Sampling(0.0, 1.0, None)
_TARGETS = {"smollm2": 4.0, "qwen2.5-0.5b-shape": 6.0}
"""Goals for the comparison with a lens model's own `generate`."""


def rows(models: list[str], quick: bool) -> Iterator[Row]:
    """Rows of every model and dtype."""
    for name in models:
        found: dict[str, dict[str, list[Sample]]] = {}
        for dtype in ("float32", "bfloat16"):
            subject = subjects.subject(name, dtype)
            subspace = _subspace(subject.pair)
            found[dtype] = _fixed_lengths(subject, subspace, quick)
            yield from _fixed_rows(subject, found[dtype])
            yield from _one_at_a_time(subject, subspace, quick)
            yield from _bridge(subject, subspace, found[dtype]["ours"])
            del subject
            settle()
        both = {"ours": found["bfloat16"]["ours"], "lens": found["float32"]["lens"]}
        what = f"the lens model's generate in float32, ours in the default dtype, batch {BATCH}"
        yield speed_row(name, "bfloat16 / float32", what, both, "lens", BATCH * NEW_TOKENS, _TARGETS[name])
    if "smollm2" in models:
        yield from _mixed_lengths(quick)
        yield from _few_shot(quick)


def _subspace(pair: spd.ModelPair) -> spd.Subspace:
    """Half of the directions at the paper's layers: which ones does not matter for speed."""
    examples = subjects.task().calibration(4, seed=0)
    return spd.extract(pair, examples, engine="twin", progress=False).subspace(rank=0.5)


def _fixed_lengths(subject: subjects.Subject, subspace: spd.Subspace, quick: bool) -> dict[str, list[Sample]]:
    """Prompts of one length, as many new tokens for each: what every engine can do without padding."""
    pair = subject.pair
    jobs, tokens, plain = _fixed(pair)
    decoding = Decoding(GREEDY, 0, NEW_TOKENS, ())

    def ours(_: int) -> list[list[int]]:
        return in_slots(pair, decoding, jobs, subspace, BATCH)

    def lens_batch(_: int) -> list[list[int]]:
        with projected(pair.lens, subspace):
            return new_tokens(pair.lens.generate(tokens, **plain), PROMPT_TOKENS)

    def twin_hooks(_: int) -> list[list[int]]:
        with projected_twin(pair.hf, subspace):
            return new_tokens(hf_generate(pair, tokens, None, NEW_TOKENS, ()), PROMPT_TOKENS)

    ways: dict[str, Callable[[int], Any]] = {"ours": ours, "lens": lens_batch, "twin": twin_hooks}
    return in_turn(ways, _rounds(subject, quick), warm_up=lambda: [way(0) for way in ways.values()])


def _rounds(subject: subjects.Subject, quick: bool) -> int:
    return 1 if quick else {"smollm2": 3, "qwen2.5-0.5b-shape": 2}[subject.name]


def _fixed(pair: spd.ModelPair) -> tuple[list[Job], torch.Tensor, dict[str, Any]]:
    """Prompts cut to one length, and a lens model's settings for greedy completions of one length."""
    jobs = jobs_of(pair, BATCH, cut=PROMPT_TOKENS)
    tokens = torch.tensor([job.prompt_ids for job in jobs], device=pair.device)
    return jobs, tokens, {"max_new_tokens": NEW_TOKENS, "do_sample": False, "stop_at_eos": False, "verbose": False}


def _fixed_rows(subject: subjects.Subject, samples: dict[str, list[Sample]]) -> Iterator[Row]:
    lens_name, n = type(subject.pair.lens).__name__, BATCH * NEW_TOKENS
    what = f"{lens_name}.generate under hooks, batch {BATCH}"
    row = speed_row(subject.name, subject.dtype, what, samples, "lens", n, _TARGETS[subject.name])
    ideal = generation_seconds(subject.pair, BATCH, BATCH * PROMPT_TOKENS, NEW_TOKENS)
    bound = statistics.median(sample.seconds for sample in samples["lens"]) / ideal
    yield replace(row, bound=f"{bound:.2f} (matrix products alone)")
    what = f"transformers' generate under hooks on the twin, batch {BATCH}"
    yield speed_row(subject.name, subject.dtype, what, samples, "twin", n, None)
    yield same_tokens_row(subject, f"{lens_name}.generate", samples["ours"][0].result, samples["lens"][0].result)


def _one_at_a_time(subject: subjects.Subject, subspace: spd.Subspace, quick: bool) -> Iterator[Row]:
    """A corpus' prompts at their own lengths: ours at its own batch size against loops on the lens model."""
    pair, lens = subject.pair, subject.pair.lens
    jobs, decoding = jobs_of(pair, 8 if quick else 32), Decoding(GREEDY, 0, NEW_TOKENS, ())
    samples = [
        timed(lambda: in_slots(pair, decoding, jobs, subspace, None), settled=False)
        for _ in range(_rounds(subject, quick))
    ]
    rates = sorted(len(jobs) * NEW_TOKENS / sample.seconds for sample in samples)
    n_new = 2 if quick else NEW_TOKENS // 4
    target = {"smollm2": 50.0, "qwen2.5-0.5b-shape": 80.0}[subject.name]

    def loop(job: Job) -> None:
        ids = list(job.prompt_ids)
        for _ in range(n_new):
            with torch.no_grad():
                logits = lens(torch.tensor([ids], device=pair.device), prepend_bos=False)
            ids.append(int(logits[0, -1].argmax()))

    def with_cache(job: Job) -> None:
        tokens = torch.tensor([job.prompt_ids], device=pair.device)
        lens.generate(tokens, max_new_tokens=n_new, do_sample=False, stop_at_eos=False, verbose=False)

    ways: tuple[tuple[Callable[[Job], None], str, float | None], ...] = (
        (loop, "a loop of forward passes under hooks, one prompt at a time", target),
        (with_cache, f"{type(lens).__name__}.generate under hooks, one prompt at a time", None),
    )
    for way, what, wanted in ways:
        with projected(lens, subspace):
            theirs = [
                n_new / timed(partial(way, job), settled=False).seconds for job in jobs[: _rounds(subject, quick)]
            ]
        yield Row.of(
            "generation", subject.name, subject.dtype, what, [rates[len(rates) // 2] / rate for rate in theirs],
            target=wanted, ours=f"{rates[len(rates) // 2]:.0f} tok/s", peer=f"{sum(theirs) / len(theirs):.1f} tok/s",
            note=f"prompts of {prompt_range(jobs)} tokens, ours {len(jobs)} at a time",
        )  # fmt: skip


def _bridge(subject: subjects.Subject, subspace: spd.Subspace, ours: list[Sample]) -> Iterator[Row]:
    """TransformerBridge, where the lens model is a HookedTransformer."""
    if subject.pair.backend == "bridge":
        return
    pair = spd.ModelPair(subject.pair.hf, subject.pair.tokenizer, backend="bridge")
    _, tokens, plain = _fixed(pair)
    with projected(pair.lens, subspace):
        pair.lens.generate(tokens[:1], **{**plain, "max_new_tokens": 2})
        peer = timed(lambda: pair.lens.generate(tokens, **plain), settled=False)
    samples, what = {"ours": ours[-1:], "bridge": [peer]}, f"TransformerBridge.generate under hooks, batch {BATCH}"
    yield speed_row(subject.name, subject.dtype, what, samples, "bridge", BATCH * NEW_TOKENS, None)


def _mixed_lengths(quick: bool) -> Iterator[Row]:
    """Prompts as they come and answers as long as the model makes them: all of a run's corpus, start to end."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        subject = subjects.subject("smollm2", dtype)
        jobs, samples = _corpus(subject, quick)
        found[dtype] = samples
        lengths = [len(ids) for ids in samples["ours"][0].result]
        row = speed_row(
            subject.name, dtype, "plain generate on the folded twin, arrival order, mixed lengths", samples, "plain",
            sum(lengths), 1.5,
        )  # fmt: skip
        yield replace(
            row, note=f"{len(jobs)} prompts of {prompt_range(jobs)} tokens, {min(lengths)}-{max(lengths)} new"
        )
        yield same_tokens_row(subject, "plain generate", samples["ours"][0].result, samples["plain"][0].result)
        settle()
    rates = [
        [sum(map(len, sample.result)) / sample.seconds for sample in found[dtype][way]]
        for dtype, way in (("bfloat16", "ours"), ("float32", "plain"))
    ]
    yield Row.of(
        "generation", "smollm2", "bfloat16 / float32", "the same, ours in the default dtype",
        [ours / plain for ours, plain in zip(*rates, strict=True)], target=3.0,
        ours=f"{statistics.median(rates[0]):.0f} tok/s", peer=f"{statistics.median(rates[1]):.0f} tok/s",
    )  # fmt: skip


def _corpus(subject: subjects.Subject, quick: bool) -> tuple[list[Job], dict[str, list[Sample]]]:
    """The same corpus by `spd_lens.generate` and by batches in order of arrival."""
    n, new = (16, 24) if quick else (48, 256)  # as long as a run's own
    pair, subspace = subject.pair, _subspace(subject.pair)
    prompts, jobs, stops = subjects.task().train(n=n, seed=0), jobs_of(pair, n), stop_tokens(pair)

    def ours(_: int) -> list[list[int]]:
        corpus = spd.generate(pair, prompts, subspace=subspace, temperature=0.0, max_new_tokens=new, progress=False)
        return [list(record.completion_ids) for record in corpus]

    def plain(_: int) -> list[list[int]]:
        return arrival_order(pair, jobs, subspace, new, stops)

    def warm_up() -> None:
        in_slots(pair, Decoding(GREEDY, 0, 4, ()), jobs[:2], subspace, BATCH)

    return jobs, in_turn({"ours": ours, "plain": plain}, 1, warm_up)


def _few_shot(quick: bool) -> Iterator[Row]:
    """Prompts behind the same worked examples, with that prefix read once and with it read every time."""
    subject = subjects.subject("smollm2", "float32")
    pair, task = subject.pair, subjects.task()
    shots = "\n\n".join(f"{example.prompt}\n{example.completion}" for example in task.calibration(4, seed=1))
    n = 8 if quick else 16
    texts = [f"{shots}\n\n{example.prompt}" for example in task.train(n=n, seed=0)]
    jobs = [
        Job(example, 0, pair.prompt_ids(example))
        for example in (spd.Example(text, id=str(i)) for i, text in enumerate(texts))
    ]
    decoding = Decoding(GREEDY, 0, 16, ())

    def shared(_: int) -> list[list[int]]:
        return in_slots(pair, decoding, jobs, None, BATCH)

    def not_shared(_: int) -> list[list[int]]:
        slots: Any = importlib.import_module("spd_lens.generation.slots")
        least, slots.MIN_PREFIX = slots.MIN_PREFIX, 10**9
        try:
            return in_slots(pair, decoding, jobs, None, BATCH)
        finally:
            slots.MIN_PREFIX = least

    samples = in_turn({"ours": shared, "plain": not_shared}, 1 if quick else 2, warm_up=lambda: shared(0))
    row = speed_row(subject.name, subject.dtype, "without sharing the few-shot prefix", samples, "plain", n * 16, None)
    yield replace(row, note=f"4 shots, prompts of {prompt_range(jobs)} tokens, 16 new")
    yield same_tokens_row(subject, "the same without sharing", samples["ours"][0].result, samples["plain"][0].result)
