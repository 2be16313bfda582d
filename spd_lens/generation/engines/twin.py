"""The engine `twin`: the Hugging Face model, batched, with the projection folded into its weights."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from spd_lens.errors import SPDError
from spd_lens.generation.engines.base import Engine, Run
from spd_lens.generation.engines.registry import register
from spd_lens.generation.jobs import Completions, Decoding, Job, Row
from spd_lens.generation.slots import Slots
from spd_lens.models import (
    ModelPair,
    angles_change_beyond,
    attention_implementation,
    free_memory,
    named_outputs,
    out_of_memory,
    packed,
    takes_slots,
)
from spd_lens.subspaces import Policy

log = logging.getLogger(__name__)

MOST_AT_A_TIME = {"cpu": 32, "cuda": 256}
"""More rows hardly raise tokens per second: from here on the arithmetic limits, not reading the weights."""
_SHARE = 0.5
"""Share of the free memory that cache and logits may take."""


@register
class TwinEngine(Engine):
    """The twin, batched, the projection folded into its weights and the adapter on copies of them."""

    name = "twin"
    says = "the Hugging Face model, batched, on folded weights"

    def under(self, policy: Policy) -> AbstractContextManager[Run]:
        """The twin under the policy, as it was afterwards."""
        return twin_engine(self.pair, self.decoding, policy, self.batch_size)


@contextlib.contextmanager
def twin_engine(pair: ModelPair, decoding: Decoding, policy: Policy, batch_size: int | None = None) -> Iterator[Run]:
    """The twin, batched, under the policy.

    `batch_size` completions at a time; None: as many as memory allows, up to `MOST_AT_A_TIME`.
    """
    with policy.applied(pair), _contiguous_unembed(pair), packed(pair.hf):
        yield partial(_together, pair, decoding, batch_size)


def _together(
    pair: ModelPair, decoding: Decoding, batch_size: int | None, jobs: Sequence[Job]
) -> Iterator[Completions]:
    """Complete all jobs together, except those that may reach the length at which a whole batch gets other angles."""
    apart = angles_change_beyond(pair.hf.config)
    sides: dict[bool, list[Job]] = {False: [], True: []}
    for job in jobs:
        sides[apart is not None and len(job.prompt_ids) + decoding.max_new_tokens > apart].append(job)
    if shared := sides[False]:
        yield from _as_memory_allows(pair, decoding, shared, batch_size or fitting(pair, decoding, shared))
    for job in sides[True]:
        yield from _as_memory_allows(pair, decoding, [job], 1)


def fitting(pair: ModelPair, decoding: Decoding, jobs: Sequence[Job]) -> int:
    """How many completions at a time the free memory holds: their keys and values at full length, and their logits."""
    shape = pair.fingerprint
    longest = max(len(job.prompt_ids) for job in jobs) + decoding.max_new_tokens
    cache = 2 * shape.n_layers * shape.n_kv_heads * shape.d_head * longest * pair.dtype.itemsize
    logits = 4 * pair.hf.get_input_embeddings().weight.shape[0] * torch.float32.itemsize
    most = MOST_AT_A_TIME.get(pair.device.type, MOST_AT_A_TIME["cpu"])
    return max(1, min(most, int(_SHARE * free_memory(pair.device) / (cache + logits))))


def _as_memory_allows(pair: ModelPair, decoding: Decoding, jobs: Sequence[Job], size: int) -> Iterator[Completions]:
    """Complete all jobs, fewer at a time where memory runs out.

    Raises:
        SPDError: there is not enough memory for a single job.
    """
    left = {job.key: job for job in jobs}
    while left:
        size = min(size, len(left))
        for completions in _until_out_of_memory(pair, decoding, list(left.values()), size):
            for job, _ in completions:
                del left[job.key]
            yield completions
        if not left:
            return
        if size == 1:
            raise SPDError(
                f"there is not enough memory for prompt {next(iter(left.values())).example.id!r} alone; lower "
                "max_new_tokens, use a narrower dtype, or let go of the lens model with pair.drop_lens()"
            )
        size //= 2
        log.info("out of memory: going on with %d prompts at a time", size)


def _until_out_of_memory(pair: ModelPair, decoding: Decoding, jobs: list[Job], size: int) -> Iterator[Completions]:
    try:
        yield from complete(pair, decoding, jobs, size)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    # out here the exception, and the tensors that its traceback held, are gone
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def complete(pair: ModelPair, decoding: Decoding, jobs: Sequence[Job], size: int) -> Iterator[Completions]:
    """Complete jobs on the twin as it is, in slots; one batch after the other where slots are not known to be right.

    Slots rely on how an architecture takes masks and positions, which tests show for those of the table.
    """
    if takes_slots(pair.hf) and attention_implementation(pair.hf.config) in ("sdpa", "eager"):
        yield from Slots(pair.hf, decoding, size).run(jobs)
        return
    ordered = sorted(jobs, key=lambda job: -len(job.prompt_ids))
    for start in range(0, len(ordered), size):
        batch = ordered[start : start + size]
        yield list(zip(batch, plain_batch(pair, decoding, batch), strict=True))


def _contiguous_unembed(pair: ModelPair) -> RemovableHandle:
    """Hand the unembedding a contiguous last position, until the handle is removed.

    transformers slices it out of the prompt's hidden states, and torch multiplies such a slice as a batch, for which it
    copies the whole unembedding matrix once per row: half of the time of 32 completions of 32 tokens on a CPU.
    """
    head = pair.hf.get_output_embeddings()
    return head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))


class _Chosen(LogitsProcessor):
    """Draws the next tokens of the rows that are not over, and leaves `generate` no other choice."""

    def __init__(self, decoding: Decoding, rows: Sequence[Row]) -> None:
        self.decoding, self.rows = decoding, rows

    def __call__(
        self, input_ids: Int[Tensor, "row pos"], scores: Float[Tensor, "row d_vocab"]
    ) -> Float[Tensor, "row d_vocab"]:
        going = [i for i, row in enumerate(self.rows) if not self.decoding.over(row)]
        if going:
            self.decoding.extend([self.rows[i] for i in going], scores[going])
        chosen = torch.tensor([[row.new_ids[-1]] for row in self.rows], device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class _AllOver(StoppingCriteria):
    """Tells `generate` which rows are over."""

    def __init__(self, decoding: Decoding, rows: Sequence[Row]) -> None:
        self.decoding, self.rows = decoding, rows

    def __call__(self, input_ids: Int[Tensor, "row pos"], scores: Any, **kwargs: Any) -> Bool[Tensor, " row"]:
        return torch.tensor([self.decoding.over(row) for row in self.rows], device=input_ids.device)


@torch.no_grad()
def plain_batch(pair: ModelPair, decoding: Decoding, jobs: Sequence[Job]) -> list[list[int]]:
    """One batch through `generate` of transformers: padded on the left, as long as its longest completion."""
    prompts = [torch.tensor(job.prompt_ids) for job in jobs]
    padded = partial(pad_sequence, batch_first=True, padding_side="left")  # new tokens follow the prompt directly
    tokens = padded(prompts, padding_value=pair.pad_id)
    mask = padded([torch.ones_like(ids) for ids in prompts])
    rows = [decoding.row(job) for job in jobs]
    # `generate` fills what a config leaves out from the model's own, which `decoding` has applied: a view without it
    twin: Any = copy.copy(pair.hf)
    twin.generation_config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,  # one token is left to choose
        pad_token_id=pair.pad_id,
        use_cache=True,
    )
    with named_outputs(pair.hf):
        twin.generate(
            input_ids=tokens.to(pair.device),
            attention_mask=mask.to(pair.device),
            logits_processor=LogitsProcessorList([_Chosen(decoding, rows)]),
            stopping_criteria=StoppingCriteriaList([_AllOver(decoding, rows)]),
        )
    return [row.new_ids for row in rows]
