"""What is to be completed, and everything beside the model that decides which tokens come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spd_lens.corpus import Key
from spd_lens.examples import Example
from spd_lens.models import ModelPair
from spd_lens.sampling import Sampler, Sampling


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


Completions = list[tuple[Job, list[int]]]
"""Jobs and their new token ids, through the first stop token."""


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
