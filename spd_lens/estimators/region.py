"""The paper's subspace from the gradients at some positions alone."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from spd_lens.estimators.base import Estimator, Shape, Source
from spd_lens.estimators.registry import register
from spd_lens.subspaces import GradientMoments, Subspace


class Region(Estimator):
    """The top directions of the gradients at the positions of some classes."""

    needs = {"keep": ("classes",)}
    classes: ClassVar[tuple[str, ...]]
    """Classes of positions, which are disjoint: `"sink"`, `"prompt"`, `"completion"`, `"scored"`."""

    def moments(self, source: Source, *, shuffled: bool = False) -> GradientMoments:
        return super().moments(source, shuffled=shuffled).region(*self.classes)

    def estimate(self, source: Source, shape: Shape) -> Subspace:
        """Around the mean over all tokens, like every projection, since all of them are projected."""
        found, everywhere = super().estimate(source, shape), super().moments(source)
        return replace(found, offset={site: everywhere.mean(site, shape.per_head) for site in found.offset})


@register
class Prompt(Region):
    """The prompt, without the sink."""

    name = "prompt"
    says = "top directions of the gradients at the prompt's tokens"
    classes = ("prompt",)


@register
class Completion(Region):
    """The completion, up to and without what is scored: the reasoning, where there is one."""

    name = "completion"
    says = "top directions of the gradients at the completion's tokens that are not scored"
    classes = ("completion",)


@register
class Scored(Region):
    """The scored tokens themselves."""

    name = "scored"
    says = "top directions of the gradients at the scored tokens"
    classes = ("scored",)
