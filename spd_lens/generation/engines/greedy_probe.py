"""Whether another engine runs the policy that it should: greedy tokens of a few texts, compared with the twin's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.generation.engines.twin import twin_engine
from spd_lens.generation.jobs import Decoding, Job
from spd_lens.generation.model_settings import ModelSettings, shown
from spd_lens.generation.record import Key
from spd_lens.generation.sampling import Sampling
from spd_lens.models import ModelPair
from spd_lens.subspaces import Policy

log = logging.getLogger(__name__)

TEXTS = (
    "Tom has 12 apples and buys 30 more. How many apples does he have now?",
    "def mean(values):\n    return",
    "The capital of France is",
    "Question: Which planet is the largest?\nA. Earth\nB. Mars\nC. Jupiter\nAnswer:",
    "Once upon a time there was a",
)
"""Words, numbers and code, so that a projection which changes one of them shows."""
N_NEW = 16
"""Tokens that are compared of each."""

ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
"""By how much of the logits' standard deviation two tokens may be apart and yet change places between engines."""

Seen = Callable[[Job, list[int]], list[int]]
"""A completion as the other engine shows it: the ids themselves, or those of its text, tokenised again."""


class OtherPolicy(SPDError):
    """Another engine does not run the policy that it should; `SUBSPACE` in the message stands for the file of one."""


@dataclass(frozen=True)
class _Difference:
    """Where a completion of a text is not the twin's."""

    job: Job
    step: int
    expected: int | None
    """The twin's token; None: it has ended."""
    found: int | None


@dataclass
class GreedyProbe:
    """The twin's greedy completions of the texts under a policy, to compare those of another engine with."""

    pair: ModelPair
    policy: Policy
    decoding: Decoding
    """How tokens are drawn otherwise; its stop tokens, and what it applies of the model's generation config, count."""
    seen: Seen = lambda job, ids: ids

    @cached_property
    def greedy(self) -> Decoding:
        """The decoding, greedy and short."""
        sampling = Sampling(0.0, 1.0, None)
        own = ModelSettings.of(self.pair, sampling, self.decoding.stop_ids)
        return replace(self.decoding, sampling=sampling, own=own, max_new_tokens=N_NEW)

    @cached_property
    def jobs(self) -> list[Job]:
        """The texts as the tokenizer has them, whatever the prompt format."""
        return [
            Job(Example(text, id=f"probe-{i}"), 0, list(self.pair.tokenizer(text)["input_ids"]))
            for i, text in enumerate(TEXTS)
        ]

    @cached_property
    def expected(self) -> dict[Key, list[int]]:
        """The twin's completions under the policy."""
        return self._twin(self.policy)

    def check(self, found: dict[Key, list[int]], where: str) -> None:
        """Compare another engine's completions, and say where they could not tell the policy from the plain model.

        Args:
            found: Its completions of `jobs`, greedy.
            where: What it is, in a sentence.

        Raises:
            OtherPolicy: A completion is another model's: its first other token is none that rounding explains.
        """
        base = self.expected if self.policy.is_base else self._twin(Policy())
        if wrong := self._difference(found):
            as_base = not self.policy.is_base and found == self._all_seen(base)
            raise OtherPolicy(self._sentence(wrong, where, as_base=as_base))
        if not self.policy.is_base and self._difference(self._all_seen(base)) is None:
            log.warning(
                "the %d texts that %s was compared on cannot tell the policy from the model without it: make sure that "
                "the model with it is what is served", len(TEXTS), where,
            )  # fmt: skip

    def _twin(self, policy: Policy) -> dict[Key, list[int]]:
        with twin_engine(self.pair, self.greedy, policy) as run:
            return {job.key: ids for completions in run(self.jobs) for job, ids in completions}

    def _all_seen(self, completions: dict[Key, list[int]]) -> dict[Key, list[int]]:
        return {job.key: self.seen(job, completions[job.key]) for job in self.jobs}

    def _difference(self, found: dict[Key, list[int]]) -> _Difference | None:
        """The first text whose completion is not the twin's beyond rounding, and where it begins to differ."""
        for job in self.jobs:
            ids = self.expected[job.key]
            wanted, got = self.seen(job, ids), found[job.key]
            if wanted == got:
                continue
            longest = range(max(len(wanted), len(got)))
            step = next(i for i in longest if wanted[i : i + 1] != got[i : i + 1])
            expected, other = (side[step] if step < len(side) else None for side in (wanted, got))
            # the twin's logits at this step are known only where the two agree on what was sampled before it
            if other is None or wanted[:step] != ids[:step] or not self._near_tie(job, ids[:step], other):
                return _Difference(job, step, expected, other)
        return None

    @torch.no_grad()
    def _near_tie(self, job: Job, before: list[int], token: int) -> bool:
        """Whether the twin all but chose this token, too."""
        ids = torch.tensor([job.prompt_ids + before], device=self.pair.device)
        with self.policy.applied(self.pair):
            logits: Float[Tensor, "1 d_vocab"] = self.pair.hf(input_ids=ids).logits[:, -1].float()
        if self.greedy.own.make is not None:
            logits = self.greedy.own.processed(logits, [(self.greedy.own.make(job.prompt_ids), ids[0].tolist())])
        spread = logits[logits.isfinite()].std()
        return bool(logits.max() - logits[0, token] <= ROUNDING[self.pair.dtype] * spread)

    def _sentence(self, wrong: _Difference, where: str, *, as_base: bool) -> str:
        def said(token: int | None) -> str:
            return "none" if token is None else f"{self.pair.tokenizer.decode([token])!r} ({token})"

        policy = "the model" if self.policy.is_base else f"the policy {self.policy.name!r}"
        parts = []
        if self.policy.adapter is not None:
            parts.append("with its adapter")
        if self.policy.subspace is not None:
            parts.append("with its projection (spd-lens export SUBSPACE --as checkpoint, or --as lora)")
        own = f" by a server that applies {shown(self.greedy.own.applied)}" if self.greedy.own.applied else ""
        return (
            f"{where} is not {policy} of {self.pair.name}: after {wrong.job.example.prompt!r} its token "
            f"{wrong.step + 1} is {said(wrong.found)}, not {said(wrong.expected)}"
            f"{', and it writes what the model without the policy does' if as_base else ''}; serve the model "
            f"{' and '.join(parts) or 'as it is'}{own}, name it in engine_model, and start again"
        )
