"""A subspace that is trained: what the gradients at one point can only promise, tried out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.parametrizations import orthogonal

from spd_lens.errors import SPDError, caution
from spd_lens.estimators.base import Estimator, Shape, Source
from spd_lens.estimators.directions import NO_SPECTRUM
from spd_lens.estimators.objective import Effect, Objective
from spd_lens.estimators.registry import get, register
from spd_lens.examples import Example
from spd_lens.models import ModelPair, neutrally
from spd_lens.subspaces import GradientMoments, Subspace, upright

log = logging.getLogger(__name__)

_SCALE = 2.0**10
"""Only the direction of a gradient counts, and small ones would underflow in float16."""


@register
class Learned(Estimator):
    """Orthonormal bases trained on the calibration examples for `loss + kl_weight · KL(base ‖ projected)`.

    The weights stay frozen. Each block's basis is a point of the Stiefel manifold, as `torch.nn.utils.parametrizations`
    has it: Householder reflections of the start. A quarter of the examples, those of every fourth shard, has no part in
    it, neither in the start nor in the steps: their loss says whether what was learned holds elsewhere.
    """

    name = "learned"
    says = "a basis trained on the calibration loss and the KL from base, a quarter of the examples held out"
    needs = {"keep": ("cross",)}
    lacks = NO_SPECTRUM
    starts = ("paper", "attribution")
    """Estimators, of which the one with the lower objective on the calibration examples is trained."""
    steps = 16
    """About three passes over 30 examples: a few minutes for SmolLM2 on one core, a third of them before and after."""
    batch = 6
    """Examples per step: enough to average over, few enough for many steps."""
    lr = 0.05
    """By how many radians the first step turns a direction, in the root mean square over all; it falls linearly to 0.

    The gradient gives the direction of a step and not its length: curvature differs a hundredfold between models. And
    rounding is not amplified, as by Adam: the loss does not change when a basis turns within its span.
    """
    momentum = 0.5
    """Of the direction: a step averages over about two batches."""
    kl_weight = 1.0
    """A nat of loss on the scored tokens is worth a nat per token by which the model is moved elsewhere."""

    def estimate(self, source: Source, shape: Shape) -> Subspace:
        examples, n_shards = source.calibration, self.moments(source).n_shards
        chosen = [i for i in range(len(examples)) if i % n_shards % 4 != 3]
        held = [example for i, example in enumerate(examples) if i not in chosen]
        if not held:
            raise SPDError(
                f"estimator {self.name!r} holds out every fourth shard of the calibration examples, and there are "
                f"{len(examples)} examples in {n_shards} shards; give at least four"
            )
        part = _Part(source, n_shards, chosen)
        starts = {name: get(name).subspace(part, shape) for name in self.starts}
        return _trained(source.pair, self, part, starts, held)


@neutrally
def _trained(pair: ModelPair, how: Learned, part: _Part, starts: dict[str, Subspace], held: list[Example]) -> Subspace:
    settings = how.moments(part).settings
    own, other = (Objective(pair, texts, settings, how.kl_weight) for texts in (part.calibration, held))
    effects = {name: own.effect(subspace) for name, subspace in starts.items()}
    start = min(effects, key=lambda name: effects[name].value)
    found = _descended(own, starts[start], how, part.seed)
    mine = [effects[start], own.effect(found)]
    if not mine[1].value < mine[0].value:  # never worse than its start on what it was trained for
        found, mine[1] = starts[start], mine[0]
    tested = [other.effect(subspace) for subspace in (starts[start], found)]
    _say(mine, tested, len(part.calibration), len(held))
    origin = {
        **{name: value for name, value in starts[start].origin.items() if name != "estimator"},
        "start": start, "steps": how.steps, "lr": how.lr, "kl_weight": how.kl_weight, "n_held_out": len(held),
        "trained": [effect.recorded for effect in mine], "held_out": [effect.recorded for effect in tested],
    }  # fmt: skip
    return replace(found, singular_values={}, origin=origin)


def _descended(objective: Objective, start: Subspace, how: Learned, seed: int) -> Subspace:
    """The subspace after all steps; the objective's own examples are drawn without replacement, pass by pass."""
    torch.manual_seed(seed)  # the parametrisation completes a basis at random
    blocks = {site: [_Basis(block) for block in start.blocks(site)] for site in start.sites}
    parameters = [p for modules in blocks.values() for module in modules for p in module.parameters()]
    optimiser = torch.optim.SGD(parameters, how.lr, momentum=how.momentum)
    slower = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, max(1, how.steps))  # the last steps settle
    n_directions = sum(sum(ranks) for ranks in start.ranks.values())
    queue: list[int] = []
    with torch.enable_grad():
        for _ in range(how.steps):
            if len(queue) < how.batch:
                queue += torch.randperm(len(objective)).tolist()
            drawn, queue = queue[: how.batch], queue[how.batch :]
            optimiser.zero_grad()
            for batch in objective.batches(drawn):
                bases = {site: _side_by_side(modules) for site, modules in blocks.items()}
                losses, kl = objective.of(batch, replace(start, bases=bases))
                (_SCALE * (losses + how.kl_weight * kl).sum()).backward()
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            total = nn.utils.get_total_norm(gradients).clamp_min(torch.finfo(torch.float64).tiny)
            for gradient in gradients:
                gradient *= n_directions**0.5 / total
            optimiser.step()
            slower.step()
    learned = {site: [upright(m.weight.detach()) for m in modules] for site, modules in blocks.items()}
    return Subspace.from_blocks(learned, start)


class _Basis(nn.Module):
    """A block's basis, which stays orthonormal wherever a step takes its parameters."""

    weight: Float[Tensor, "width rank"]

    def __init__(self, basis: Float[Tensor, "width rank"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(basis.clone())
        if basis.shape[1]:
            orthogonal(self, "weight")


def _side_by_side(blocks: Sequence[_Basis]) -> Float[Tensor, "block width rank"]:
    weights = [block.weight for block in blocks]
    most = max(weight.shape[1] for weight in weights)
    return torch.stack([pad(weight, (0, most - weight.shape[1])) for weight in weights])


def _say(mine: Sequence[Effect], tested: Sequence[Effect], n_mine: int, n_tested: int) -> None:
    """Calibration and held-out loss side by side, before and after."""
    log.info(
        "learned: loss of %d calibration examples %.3f -> %.3f (KL from base %.3f -> %.3f), of %d held out %.3f -> "
        "%.3f (%.3f -> %.3f)",
        *(n_mine, mine[0].loss, mine[1].loss, mine[0].kl, mine[1].kl),
        *(n_tested, tested[0].loss, tested[1].loss, tested[0].kl, tested[1].kl),
    )
    fall, rise = mine[0].loss - mine[1].loss, tested[1].loss - tested[0].loss
    if fall > 0 and rise > 0:
        caution(
            f"the learned subspace overfits: training lowered the loss of its own {n_mine} examples by {fall:.3f} nats "
            f"and raised that of {n_tested} held-out ones by {rise:.3f}; give more calibration examples, or take "
            "another estimator"
        )


@dataclass(frozen=True)
class _Part:
    """Some examples of a source, which are all those of some of its shards, as a source."""

    whole: Source
    n_shards: int
    chosen: list[int]

    @property
    def pair(self) -> ModelPair:
        return self.whole.pair

    @property
    def seed(self) -> int:
        return self.whole.seed

    @property
    def calibration(self) -> list[Example]:
        return [self.whole.calibration[i] for i in self.chosen]

    def gradients(self, **how: Any) -> GradientMoments:
        return self.whole.gradients(**how).shards(sorted({i % self.n_shards for i in self.chosen}))
