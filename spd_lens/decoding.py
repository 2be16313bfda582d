"""The two engines that turn prompts into completions: the batched twin, and the lens model under hooks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from spd_lens.corpus import Key
from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.models import ModelPair
from spd_lens.models.adapters import adapted
from spd_lens.models.backends import lens_logits
from spd_lens.projection import folded, projected
from spd_lens.sampling import Sampler, Sampling
from spd_lens.subspace import Subspace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One completion to be made."""

    example: Example
    sample: int
    prompt_ids: list[int]

    @property
    def key(self) -> Key:
        return self.example.id, self.sample


@dataclass(frozen=True)
class Decoding:
    """Everything beside the model that decides which tokens come out."""

    sampling: Sampling
    seed: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]

    def sampler(self, jobs: Sequence[Job]) -> Sampler:
        return Sampler(self.sampling, [job.key for job in jobs], self.seed, self.max_new_tokens)

    def up_to_stop(self, ids: list[int]) -> list[int]:
        """Through the first stop token; what follows it is padding."""
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), len(ids) - 1)
        return ids[: end + 1]


Engine = Callable[[Sequence[Job]], list[list[int]]]
"""From a batch of jobs to the new token ids of each, through the first stop token."""


def stop_tokens(pair: ModelPair) -> tuple[int, ...]:
    """Ids that end a completion, ascending: the generation config's, the tokenizer's, and the chat's end of turn.

    A base model's own EOS is often not what its chat template ends a turn with; a chat must stop at that too.
    """
    own: Any = pair.hf.generation_config.eos_token_id
    ids = set(own if isinstance(own, (list, tuple)) else [own]) | {pair.tokenizer.eos_token_id}
    if pair.format.chat:
        ids.add(_end_of_turn(pair.tokenizer))
    return tuple(sorted(int(id) for id in ids if id is not None))


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts right behind an assistant's message, if it does."""
    mark = "spdlens"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": mark}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text.rpartition(mark)[2], add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.all_special_ids else None


@contextlib.contextmanager
def twin_engine(
    pair: ModelPair, decoding: Decoding, subspace: Subspace | None, strength: float, adapter: str | Path | None
) -> Iterator[Engine]:
    """The twin, batched, with the adapter on and the projection folded into its weights."""
    with (
        adapted(pair.hf, adapter),
        folded(pair.hf, subspace, strength),  # after the adapter, so that what it adds is projected too
        _plain_config(pair, decoding),
        _contiguous_unembed(pair),
    ):
        yield lambda jobs: _complete_on_twin(pair, jobs, decoding)


@contextlib.contextmanager
def lens_engine(pair: ModelPair, decoding: Decoding, subspace: Subspace | None, strength: float) -> Iterator[Engine]:
    """The lens model, one prompt at a time, with the projection as hooks."""
    with projected(pair.lens, subspace, strength) if subspace is not None else contextlib.nullcontext():
        yield lambda jobs: [_complete_on_lens(pair, job, decoding) for job in jobs]


@contextlib.contextmanager
def _plain_config(pair: ModelPair, decoding: Decoding) -> Iterator[None]:
    """Decoding with nothing but what the settings record.

    `hf.generate` fills what a config leaves out from the model's own (a repetition penalty, say), so the model's own
    is put aside meanwhile.
    """
    twin: PreTrainedModel = pair.hf
    own = twin.generation_config
    twin.generation_config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,  # the sampler leaves one token to choose
        eos_token_id=list(decoding.stop_ids) or None,
        pad_token_id=pair.tokenizer.pad_token_id,
        use_cache=True,
    )
    try:
        yield
    finally:
        twin.generation_config = own


@contextlib.contextmanager
def _contiguous_unembed(pair: ModelPair) -> Iterator[None]:
    """Hand the unembedding a contiguous last position.

    transformers slices it out of the prompt's hidden states, and torch multiplies such a slice as a batch, for which it
    copies the whole unembedding matrix once per row: half of the time of 32 completions of 32 tokens on a CPU.
    """
    head = pair.hf.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


class _OneToken(LogitsProcessor):
    """Leaves the token that the sampler chose as the only one possible."""

    def __init__(self, sampler: Sampler, prompt_length: int) -> None:
        self.sampler = sampler
        self.prompt_length = prompt_length

    def __call__(
        self, input_ids: Int[Tensor, "row pos"], scores: Float[Tensor, "row d_vocab"]
    ) -> Float[Tensor, "row d_vocab"]:
        chosen = self.sampler.choose(scores, step=input_ids.shape[1] - self.prompt_length)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


@torch.no_grad()
def _complete_on_twin(pair: ModelPair, jobs: Sequence[Job], decoding: Decoding) -> list[list[int]]:
    longest = max(len(job.prompt_ids) for job in jobs)
    tokens = torch.full((len(jobs), longest), pair.tokenizer.pad_token_id)
    mask = torch.zeros_like(tokens)
    for row, job in enumerate(jobs):  # padding on the left: new tokens follow the prompt directly
        tokens[row, longest - len(job.prompt_ids) :] = torch.tensor(job.prompt_ids)
        mask[row, longest - len(job.prompt_ids) :] = 1
    output: Any = pair.hf.generate(
        input_ids=tokens.to(pair.device),
        attention_mask=mask.to(pair.device),
        logits_processor=LogitsProcessorList([_OneToken(decoding.sampler(jobs), longest)]),
    )
    return [decoding.up_to_stop(row) for row in output[:, longest:].tolist()]


@torch.no_grad()
def _complete_on_lens(pair: ModelPair, job: Job, decoding: Decoding) -> list[int]:
    """Every step runs the whole sequence: no cache, nothing that a hook could miss."""
    sampler = decoding.sampler([job])
    ids = list(job.prompt_ids)
    for step in range(decoding.max_new_tokens):
        tokens = torch.tensor([ids], device=pair.device)
        logits = lens_logits(pair.lens, tokens, torch.ones_like(tokens))
        ids.append(int(sampler.choose(logits[:, -1].float(), step)))
        if ids[-1] in decoding.stop_ids:
            break
    return ids[len(job.prompt_ids) :]


def completed(engine: Engine, batch: Sequence[Job]) -> Iterator[tuple[Sequence[Job], list[list[int]]]]:
    """Run a batch, in smaller parts where memory runs out.

    Raises:
        SPDError: there is not enough memory for a single job.
    """
    size, place = len(batch), 0
    while place < len(batch):
        part = batch[place : place + size]
        completions = _unless_out_of_memory(engine, part)
        if completions is not None:
            yield part, completions
            place += len(part)
        elif len(part) == 1:
            raise SPDError(
                f"there is not enough memory for prompt {part[0].example.id!r} alone; lower max_new_tokens, use a "
                "narrower dtype, or let go of the lens model with pair.drop_lens()"
            )
        else:
            size = len(part) // 2
            log.info("out of memory: going on with %d prompts at a time", size)


def _unless_out_of_memory(engine: Engine, part: Sequence[Job]) -> list[list[int]] | None:
    try:
        return engine(part)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU allocator raises a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
    # out here the exception, and the tensors that its traceback held, are gone
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
