"""Self-Policy Distillation (paper section 3), and what is left of it when one part is changed."""

from __future__ import annotations

from spd_lens.errors import SPDError
from spd_lens.methods.base import Method
from spd_lens.methods.registry import register
from spd_lens.runs import Experiment
from spd_lens.subspaces import Policy, Subspace


@register
class SelfPolicyDistillation(Method):
    """Generate under the projection onto the gradients' top directions (Eq. 6-13)."""

    name = "spd"
    says = "self-policy distillation (Eq. 6-14)"

    def subspace(self, experiment: Experiment) -> Subspace:
        """What is kept of K and V."""
        return experiment.subspace()

    def projection(self, experiment: Experiment) -> Policy:
        return Policy(self.name, self.subspace(experiment), experiment.config.strength)


@register
class FullLoss(SelfPolicyDistillation):
    """Gradients of the loss on all completion tokens (paper table 5)."""

    name = "spd-full-loss"
    says = "control: gradients of all completion tokens, not of the answer's (paper table 5)"
    is_control = True

    def subspace(self, experiment: Experiment) -> Subspace:
        return experiment.subspace(experiment.moments(loss="full"))


@register
class ShuffledAnswers(SelfPolicyDistillation):
    """The calibration answers permuted between the examples: same texts and formats, no correctness."""

    name = "spd-shuffled"
    says = "control: gradients towards another example's answer"
    is_control = True

    def subspace(self, experiment: Experiment) -> Subspace:
        return experiment.subspace(experiment.moments(shuffled=True))


@register
class ActivationPCA(SelfPolicyDistillation):
    """The top directions of the activations themselves, uncentred like the gradients: no gradient at all."""

    name = "spd-activation-pca"
    says = "control: top directions of the activations, not of the gradients"
    is_control = True

    def subspace(self, experiment: Experiment) -> Subspace:
        return experiment.subspace(of="activation")


@register
class Complement(SelfPolicyDistillation):
    """`I - P`: keeps what SPD throws away."""

    name = "spd-complement"
    says = "control: I - P, what SPD throws away"
    is_control = True

    def subspace(self, experiment: Experiment) -> Subspace:
        return ~experiment.subspace()


class _OneKind(SelfPolicyDistillation):
    kind: str
    is_control = True

    def subspace(self, experiment: Experiment) -> Subspace:
        found = experiment.subspace()
        sites = [site for site in found.sites if site.kind == self.kind]
        if not sites:
            raise SPDError(
                f"method {self.name!r} projects {self.kind} alone, but kinds = {','.join(experiment.config.kinds)} has "
                f"no {self.kind}; add it or leave the method out"
            )
        return found.select(sites)


@register
class KeysOnly(_OneKind):
    """Only keys are projected."""

    name = "spd-k-only"
    says = "control: keys projected, values left alone"
    kind = "k"


@register
class ValuesOnly(_OneKind):
    """Only values are projected."""

    name = "spd-v-only"
    says = "control: values projected, keys left alone"
    kind = "v"
