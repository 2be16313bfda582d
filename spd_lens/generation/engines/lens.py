"""The engine `lens`: the lens model under hooks, one prompt at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from spd_lens.errors import SPDError
from spd_lens.generation.engines.base import Engine, Run
from spd_lens.generation.engines.registry import register
from spd_lens.generation.jobs import Decoding, Job
from spd_lens.models import ModelPair, lens_logits
from spd_lens.subspaces import Policy, projected


@register
class LensEngine(Engine):
    """The lens model, one prompt at a time, with the projection as hooks; compared with the twin first."""

    name = "lens"
    says = "the lens model under hooks, one prompt at a time"
    runs = "lens"

    def prepare(self, jobs: Sequence[Job], policies: Sequence[Policy]) -> Mapping[str, Any]:
        """Refuse adapters, and prove the lens model at the length of the longest prompt and its completion."""
        if any(policy.adapter is not None for policy in policies):
            raise SPDError(
                "the lens engine runs the lens model's own weights; bring the adapter there with "
                "pair.sync(to='lens', adapter=...) and leave adapter out, or use engine='twin'"
            )
        self.pair.lens_at(max(len(job.prompt_ids) for job in jobs) + self.decoding.max_new_tokens)
        return {}

    @contextlib.contextmanager
    def under(self, policy: Policy) -> Iterator[Run]:
        """The lens model with the policy's projection."""
        lens, subspace = self.pair.proven_lens, policy.subspace
        with projected(lens, subspace, policy.strength) if subspace is not None else contextlib.nullcontext():
            yield lambda jobs: ([(job, _complete(self.pair, job, self.decoding))] for job in jobs)


@torch.no_grad()
def _complete(pair: ModelPair, job: Job, decoding: Decoding) -> list[int]:
    """Complete one job; every step runs the whole sequence, so that hooks see everything."""
    row = decoding.row(job)
    while not decoding.over(row):
        tokens = torch.tensor([row.ids], device=pair.device)
        logits = lens_logits(pair.lens, tokens, torch.ones_like(tokens))
        decoding.extend([row], logits[:, -1].float())
    return row.new_ids
