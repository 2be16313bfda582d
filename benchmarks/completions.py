"""Ways to complete prompts that the benchmark of generation compares, and the rows that say how they compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

import spd_lens as spd
from benchmarks import subjects
from benchmarks.measure import Sample, ratios
from benchmarks.table import Row
from spd_lens.generation import Decoding, Job, twin_engine
from spd_lens.subspaces import Policy


def jobs_of(pair: spd.ModelPair, n: int, cut: int | None = None) -> list[Job]:
    """`n` training prompts, always the same ones, each cut to `cut` tokens if that is given."""
    return [Job(example, 0, pair.prompt_ids(example)[:cut]) for example in subjects.task().train(n=n, seed=0)]


def in_slots(
    pair: spd.ModelPair,
    decoding: Decoding,
    jobs: Sequence[Job],
    subspace: spd.Subspace | None,
    batch_size: int | None,
) -> list[list[int]]:
    """Our way: the folded twin in slots; `batch_size` None is our own choice."""
    with twin_engine(pair, decoding, Policy(subspace=subspace), batch_size) as run:
        made = {job.key: ids for completions in run(jobs) for job, ids in completions}
    return [made[job.key] for job in jobs]


def arrival_order(
    pair: spd.ModelPair, jobs: Sequence[Job], subspace: spd.Subspace, new: int, stops: tuple[int, ...]
) -> list[list[int]]:
    """Batches of 32 as the prompts come, padded on the left, each as long as its longest answer."""
    made: list[list[int]] = []
    with spd.folded(pair.hf, subspace):
        for start in range(0, len(jobs), 32):
            batch = [job.prompt_ids for job in jobs[start : start + 32]]
            longest = max(map(len, batch))
            pad = pair.pad_id
            tokens = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in batch], device=pair.device)
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch], device=pair.device)
            for ids in new_tokens(hf_generate(pair, tokens, mask, new, stops), longest):
                end = next((i for i, token in enumerate(ids) if token in stops), len(ids) - 1)
                made.append(ids[: end + 1])
    return made


def hf_generate(
    pair: spd.ModelPair, tokens: torch.Tensor, mask: torch.Tensor | None, new: int, stops: tuple[int, ...]
) -> torch.Tensor:
    """Greedy `generate` of transformers on the twin as it is, with none of the model's own settings."""
    own, pair.hf.generation_config = pair.hf.generation_config, GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=list(stops) or None, pad_token_id=pair.pad_id
    )  # fmt: skip
    try:
        mask = torch.ones_like(tokens) if mask is None else mask
        return pair.hf.generate(input_ids=tokens, attention_mask=mask)
    finally:
        pair.hf.generation_config = own


def new_tokens(sequences: torch.Tensor, prompt: int) -> list[list[int]]:
    """What follows `prompt` tokens."""
    return sequences[:, prompt:].tolist()


def prompt_range(jobs: Sequence[Job]) -> str:
    """Tokens of the shortest and of the longest prompt."""
    lengths = [len(job.prompt_ids) for job in jobs]
    return f"{min(lengths)}-{max(lengths)}"


def speed_row(
    model: str, dtype: str, peer: str, samples: dict[str, list[Sample]], way: str, n: int, target: float | None
) -> Row:
    """How many times faster ours is; each way made `n` tokens a round."""
    speeds = [n / sorted(s.seconds for s in samples[name])[len(samples[name]) // 2] for name in ("ours", way)]
    return Row.of(
        "generation", model, dtype, peer, ratios(samples["ours"], samples[way]), target=target,
        ours=f"{speeds[0]:.0f} tok/s", peer=f"{speeds[1]:.1f} tok/s",
    )  # fmt: skip


def same_tokens_row(subject: subjects.Subject, peer: str, ours: list[list[int]], theirs: list[list[int]]) -> Row:
    """The share of completions with the very tokens of the peer; promised in float32 alone."""
    share = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
    target = 1.0 if subject.dtype == "float32" else None
    what = f"same greedy tokens as {peer}"
    return Row.of("generation", subject.name, subject.dtype, what, [share], target=target, unit="of completions")
