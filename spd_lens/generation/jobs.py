"""What is to be completed, and everything beside the model that decides which tokens come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.examples import Example
from spd_lens.generation.model_settings import ModelSettings, Processor
from spd_lens.generation.record import FinishReason, Key
from spd_lens.generation.sampling import Sampling, choose, require_finite
from spd_lens.models import ModelPair, row_uniforms
from spd_lens.settings import SamplingSettings


@dataclass(frozen=True)
class Job:
    """One completion to be made."""

    example: Example
    sample: int
    prompt_ids: list[int]

    @property
    def key(self) -> Key:
        return self.example.id, self.sample


@dataclass
class Row:
    """A completion in the making."""

    job: Job
    uniforms: Float[np.ndarray, " step"]
    """Its noise."""
    process: Processor | None
    """What the model's generation config does to its logits."""
    new_ids: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """Prompt and new tokens."""
        return self.job.prompt_ids + self.new_ids

    @property
    def position(self) -> int:
        """Where the last of them stands."""
        return len(self.job.prompt_ids) + len(self.new_ids) - 1


@dataclass(frozen=True)
class Decoding:
    """Everything beside the model that decides which tokens come out."""

    sampling: Sampling
    seed: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    own: ModelSettings = ModelSettings()
    """What the model's generation config asks for beside `sampling`."""
    max_prompt_tokens: int | None = None
    """How many of a prompt's first tokens the model is given; None: all."""

    @classmethod
    def of(cls, pair: ModelPair, settings: SamplingSettings) -> Decoding:
        """What these settings mean for a model; `SPDError` if a setting is out of range."""
        sampling = Sampling.resolve(pair, settings.temperature, settings.top_p, settings.top_k)
        stop_ids = stop_tokens(pair)
        own = ModelSettings.of(pair, sampling, stop_ids)
        return cls(sampling, settings.seed, settings.max_new_tokens, stop_ids, own, settings.max_prompt_tokens)

    def row(self, job: Job) -> Row:
        """A completion without a token."""
        noise = row_uniforms(self.seed, *job.key, self.max_new_tokens)
        return Row(job, noise, self.own.make(job.prompt_ids) if self.own.make else None)

    def extend(self, rows: Sequence[Row], logits: Float[Tensor, "row d_vocab"]) -> None:
        """Choose every row's next token from its logits.

        Raises:
            SPDError: the logits are not finite, or the model's generation config leaves no token to choose.
        """
        steps = [len(row.new_ids) for row in rows]
        noise = torch.from_numpy(np.array([row.uniforms[step] for row, step in zip(rows, steps, strict=True)]))
        names = [row.job.example.name for row in rows]
        processors = [(row.process, row.ids) for row in rows if row.process is not None]
        if processors:  # either all rows have one or none
            require_finite(logits.amax(dim=-1), steps, names)
            logits = self.own.processed(logits, processors)
        chosen = choose(logits, self.own.sampling or self.sampling, noise, steps, names)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.new_ids.append(token)

    def over(self, row: Row) -> bool:
        """Whether a row has ended by itself, or is as long as it may be."""
        return len(row.new_ids) == self.max_new_tokens or self.reason(row.job, row.new_ids) != "length"

    def reason(self, job: Job, new_ids: list[int]) -> FinishReason:
        """Why a completion ends with these tokens, if it does."""
        if new_ids and new_ids[-1] in self.stop_ids:
            return "eos"
        return "stop" if new_ids and self.own.stopped(job.prompt_ids, new_ids) else "length"


Completions = list[tuple[Job, list[int]]]
"""Jobs and their new token ids, through what ended them."""


def stop_tokens(pair: ModelPair) -> tuple[int, ...]:
    """Ids that end a completion, ascending: the generation config's, the tokenizer's, and the chat's end of turn.

    A base model's own EOS is often not what its chat template ends a turn with; a chat must stop at that too.
    """
    own: Any = pair.hf.generation_config.eos_token_id
    ids = set(own if isinstance(own, (list, tuple)) else [own]) | {pair.tokenizer.eos_token_id}
    ids.add(pair.format.end_of_turn())
    return tuple(sorted(int(id) for id in ids if id is not None))
