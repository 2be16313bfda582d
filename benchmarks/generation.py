"""Generation under a projection: slots on the folded twin against the ways with hooks, and against plain `generate`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

import spd_lens as spd
from benchmarks import machine, subjects
from benchmarks.measure import Sample, in_turn, ratios, settle, timed
from benchmarks.table import Row
from spd_lens import slots
from spd_lens.decoding import Decoding, Job, stop_tokens
from spd_lens.engines import twin_engine
from spd_lens.models.weights import twin_hook
from spd_lens.projection import projected
from spd_lens.sampling import Sampling

BATCH = 16
PROMPT_TOKENS = 64
NEW_TOKENS = 48
GREEDY = Sampling(0.0, 1.0, None)
_TARGETS = {"smollm2": 4.0, "qwen2.5-0.5b-shape": 6.0}
"""Against a lens model's own `generate`."""


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
        yield _speed(name, "bfloat16 / float32", what, both, "lens", BATCH * NEW_TOKENS, _TARGETS[name])
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
        return _in_slots(pair, decoding, jobs, subspace)

    def lens_batch(_: int) -> list[list[int]]:
        with projected(pair.lens, subspace):
            return _new(pair.lens.generate(tokens, **plain))

    def twin_hooks(_: int) -> list[list[int]]:
        with _TwinHooks(pair, subspace):
            return _new(_hf_generate(pair, tokens, None, NEW_TOKENS, ()))

    ways: dict[str, Callable[[int], Any]] = {"ours": ours, "lens": lens_batch, "twin": twin_hooks}
    return in_turn(ways, _rounds(subject, quick), warm_up=lambda: [way(0) for way in ways.values()])


def _rounds(subject: subjects.Subject, quick: bool) -> int:
    return 1 if quick else {"smollm2": 3, "qwen2.5-0.5b-shape": 2}[subject.name]


def _fixed(pair: spd.ModelPair) -> tuple[list[Job], torch.Tensor, dict[str, Any]]:
    """Prompts cut to one length, and a lens model's settings for greedy completions of one length."""
    jobs = _jobs(pair, BATCH, cut=PROMPT_TOKENS)
    tokens = torch.tensor([job.prompt_ids for job in jobs], device=pair.device)
    return jobs, tokens, {"max_new_tokens": NEW_TOKENS, "do_sample": False, "stop_at_eos": False, "verbose": False}


def _fixed_rows(subject: subjects.Subject, samples: dict[str, list[Sample]]) -> Iterator[Row]:
    lens_name, n = type(subject.pair.lens).__name__, BATCH * NEW_TOKENS
    what = f"{lens_name}.generate under hooks, batch {BATCH}"
    row = _speed(subject.name, subject.dtype, what, samples, "lens", n, _TARGETS[subject.name])
    bound = statistics.median(sample.seconds for sample in samples["lens"]) / _matrix_seconds(subject.pair)
    yield replace(row, bound=f"{bound:.2f} (matrix products alone)")
    yield _speed(
        subject.name,
        subject.dtype,
        f"transformers' generate under hooks on the twin, batch {BATCH}",
        samples,
        "twin",
        n,
        None,
    )
    yield _same(subject, f"{lens_name}.generate", samples["ours"][0].result, samples["lens"][0].result)


def _matrix_seconds(pair: spd.ModelPair) -> float:
    """Seconds of nothing but the matrix products that the prompts and the steps need, at the rate of this moment."""
    linears = [module for module in pair.hf.modules() if isinstance(module, torch.nn.Linear)]
    head = pair.hf.get_output_embeddings()

    def products(n: int, layers: list[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        widths = {layer.in_features for layer in layers}
        inputs = {width: torch.randn(n, width, dtype=pair.dtype, device=pair.device) for width in widths}
        return [(inputs[layer.in_features], layer.weight.T) for layer in layers]

    reading = machine.matrix_seconds(products(BATCH * PROMPT_TOKENS, [m for m in linears if m is not head]))
    return reading + NEW_TOKENS * machine.matrix_seconds(products(BATCH, linears))


def _one_at_a_time(subject: subjects.Subject, subspace: spd.Subspace, quick: bool) -> Iterator[Row]:
    """A corpus' prompts at their own lengths: ours at its own batch size against loops on the lens model."""
    pair, lens = subject.pair, subject.pair.lens
    jobs, decoding = _jobs(pair, 8 if quick else 32), Decoding(GREEDY, 0, NEW_TOKENS, ())
    samples = [
        timed(lambda: _in_slots(pair, decoding, jobs, subspace, None), settled=False)
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
        each = sorted(rates[len(rates) // 2] / rate for rate in theirs)
        yield Row(
            "generation", subject.name, subject.dtype, what, each[len(each) // 2], each[0], each[-1], wanted,
            ours=f"{rates[len(rates) // 2]:.0f} tok/s", peer=f"{sum(theirs) / len(theirs):.1f} tok/s",
            note=f"prompts of {_range(jobs)} tokens, ours {len(jobs)} at a time",
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
    n = BATCH * NEW_TOKENS
    samples = {"ours": ours[-1:], "bridge": [peer]}
    yield _speed(
        subject.name,
        subject.dtype,
        f"TransformerBridge.generate under hooks, batch {BATCH}",
        samples,
        "bridge",
        n,
        None,
    )


def _mixed_lengths(quick: bool) -> Iterator[Row]:
    """Prompts as they come and answers as long as the model makes them: all of a run's corpus, start to end."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        subject = subjects.subject("smollm2", dtype)
        jobs, samples = _corpus(subject, quick)
        found[dtype] = samples
        lengths = [len(ids) for ids in samples["ours"][0].result]
        row = _speed(
            subject.name, dtype, "plain generate on the folded twin, arrival order, mixed lengths", samples, "plain",
            sum(lengths), 1.5,
        )  # fmt: skip
        yield replace(row, note=f"{len(jobs)} prompts of {_range(jobs)} tokens, {min(lengths)}-{max(lengths)} new")
        yield _same(subject, "plain generate", samples["ours"][0].result, samples["plain"][0].result)
        settle()
    rates = [
        [sum(map(len, sample.result)) / sample.seconds for sample in found[dtype][way]]
        for dtype, way in (("bfloat16", "ours"), ("float32", "plain"))
    ]
    each = sorted(ours / plain for ours, plain in zip(*rates, strict=True))
    yield Row(
        "generation", "smollm2", "bfloat16 / float32", "the same, ours in the default dtype", statistics.median(each),
        each[0], each[-1], 3.0, ours=f"{statistics.median(rates[0]):.0f} tok/s",
        peer=f"{statistics.median(rates[1]):.0f} tok/s",
    )  # fmt: skip


def _corpus(subject: subjects.Subject, quick: bool) -> tuple[list[Job], dict[str, list[Sample]]]:
    """The same corpus by `spd_lens.generate` and by batches in order of arrival."""
    n, new = (16, 24) if quick else (48, 256)  # as long as a run's own
    pair, subspace = subject.pair, _subspace(subject.pair)
    prompts, jobs, stops = subjects.task().train(n=n, seed=0), _jobs(pair, n), stop_tokens(pair)

    def ours(_: int) -> list[list[int]]:
        corpus = spd.generate(pair, prompts, subspace=subspace, temperature=0.0, max_new_tokens=new, progress=False)
        return [list(record.completion_ids) for record in corpus]

    def plain(_: int) -> list[list[int]]:
        return _arrival_order(pair, jobs, subspace, new, stops)

    def warm_up() -> None:
        _in_slots(pair, Decoding(GREEDY, 0, 4, ()), jobs[:2], subspace)

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
        return _in_slots(pair, decoding, jobs, None)

    def not_shared(_: int) -> list[list[int]]:
        least, slots.MIN_PREFIX = slots.MIN_PREFIX, 10**9
        try:
            return _in_slots(pair, decoding, jobs, None)
        finally:
            slots.MIN_PREFIX = least

    samples = in_turn({"ours": shared, "plain": not_shared}, 1 if quick else 2, warm_up=lambda: shared(0))
    row = _speed(subject.name, subject.dtype, "without sharing the few-shot prefix", samples, "plain", n * 16, None)
    yield replace(row, note=f"4 shots, prompts of {_range(jobs)} tokens, 16 new")
    yield _same(subject, "the same without sharing", samples["ours"][0].result, samples["plain"][0].result)


def _jobs(pair: spd.ModelPair, n: int, cut: int | None = None) -> list[Job]:
    return [Job(example, 0, pair.prompt_ids(example)[:cut]) for example in subjects.task().train(n=n, seed=0)]


def _in_slots(
    pair: spd.ModelPair,
    decoding: Decoding,
    jobs: Sequence[Job],
    subspace: spd.Subspace | None,
    batch_size: int | None = BATCH,
) -> list[list[int]]:
    with twin_engine(pair, decoding, subspace, 1.0, None, batch_size) as run:
        made = {job.key: ids for completions in run(jobs) for job, ids in completions}
    return [made[job.key] for job in jobs]


def _arrival_order(
    pair: spd.ModelPair, jobs: Sequence[Job], subspace: spd.Subspace, new: int, stops: tuple[int, ...]
) -> list[list[int]]:
    """Batches of 32 as the prompts come, padded on the left, each as long as its longest answer."""
    made: list[list[int]] = []
    with spd.folded(pair.hf, subspace):
        for start in range(0, len(jobs), 32):
            batch = [job.prompt_ids for job in jobs[start : start + 32]]
            longest = max(map(len, batch))
            pad = pair.tokenizer.pad_token_id
            tokens = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in batch], device=pair.device)
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch], device=pair.device)
            for ids in _new(_hf_generate(pair, tokens, mask, new, stops), longest):
                end = next((i for i, token in enumerate(ids) if token in stops), len(ids) - 1)
                made.append(ids[: end + 1])
    return made


def _hf_generate(
    pair: spd.ModelPair, tokens: torch.Tensor, mask: torch.Tensor | None, new: int, stops: tuple[int, ...]
) -> torch.Tensor:
    own, pair.hf.generation_config = pair.hf.generation_config, GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=list(stops) or None, pad_token_id=pair.tokenizer.pad_token_id
    )  # fmt: skip
    try:
        mask = torch.ones_like(tokens) if mask is None else mask
        return pair.hf.generate(input_ids=tokens, attention_mask=mask)
    finally:
        pair.hf.generation_config = own


class _TwinHooks:
    """The projection as hooks on the twin."""

    def __init__(self, pair: spd.ModelPair, subspace: spd.Subspace) -> None:
        self.pair, self.subspace = pair, subspace

    def __enter__(self) -> None:
        self.handles = []
        for site in self.subspace.sites:
            n_heads, d_head = self.pair.fingerprint.heads_at(site)

            def project(x: torch.Tensor, site: spd.Site = site, n: int = n_heads, d: int = d_head) -> torch.Tensor:
                return self.subspace(x.unflatten(-1, (n, d)), site).flatten(-2)

            self.handles.append(twin_hook(self.pair.hf, site, project))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _new(sequences: torch.Tensor, prompt: int = PROMPT_TOKENS) -> list[list[int]]:
    return sequences[:, prompt:].tolist()


def _range(jobs: Sequence[Job]) -> str:
    lengths = [len(job.prompt_ids) for job in jobs]
    return f"{min(lengths)}-{max(lengths)}"


def _speed(
    model: str, dtype: str, peer: str, samples: dict[str, list[Sample]], way: str, n: int, target: float | None
) -> Row:
    value, low, high = ratios(samples["ours"], samples[way])
    speeds = [n / sorted(s.seconds for s in samples[name])[len(samples[name]) // 2] for name in ("ours", way)]
    return Row(
        "generation", model, dtype, peer, value, low, high, target,
        ours=f"{speeds[0]:.0f} tok/s", peer=f"{speeds[1]:.1f} tok/s",
    )  # fmt: skip


def _same(subject: subjects.Subject, peer: str, ours: list[list[int]], theirs: list[list[int]]) -> Row:
    """The share of completions with the very tokens of the peer; promised in float32 alone."""
    share = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
    target = 1.0 if subject.dtype == "float32" else None
    return Row(
        "generation", subject.name, subject.dtype, f"same greedy tokens as {peer}", share, share, share, target,
        unit="of completions",
    )  # fmt: skip
