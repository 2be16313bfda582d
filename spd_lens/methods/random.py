"""Random subspaces in the gradients' place: of the same shape, or matched to do the same damage."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import torch
from einops import einsum

from spd_lens.errors import SPDError
from spd_lens.evaluation import at_equal_kl, teacher_forced
from spd_lens.methods.registry import register
from spd_lens.methods.spd import SelfPolicyDistillation
from spd_lens.runs import Experiment
from spd_lens.subspaces import GradientMoments, Policy, Subspace

N_MATCHING = 16
"""Calibration examples on which damage is matched: their KL is paired, so few are enough, and none is a test item."""
KL_TOLERANCE = 0.02
"""Relative. Single random subspaces differ by more than ten times as much."""


@register
class Random(SelfPolicyDistillation):
    """Same sites, blocks and ranks, directions at random (one draw per seed)."""

    name = "spd-random"
    says = "control: random directions of the same ranks"
    is_control = True

    def subspace(self, experiment: Experiment) -> Subspace:
        return experiment.subspace().random_like(experiment.config.seed)


@register
class RandomSameEnergy(SelfPolicyDistillation):
    """Random directions, as many in each block as keep the share of activation energy that SPD's directions keep."""

    name = "spd-random-energy"
    says = "control: random directions that keep as much activation energy"
    is_control = True

    def subspace(self, experiment: Experiment) -> Subspace:
        return matched_in_energy(experiment.subspace(), experiment.moments(), experiment.config.seed)


@register
class RandomSameKL(SelfPolicyDistillation):
    """Random directions of the same ranks, at the strength at which they move the model as far as SPD's do."""

    name = "spd-random-kl"
    says = "control: random directions at the strength with the same KL from base"
    is_control = True

    def projection(self, experiment: Experiment) -> Policy:
        """Match KL on the gold completions of a few calibration examples.

        Raises:
            SPDError: no number of random directions moves the model as far (SPD's projection is extreme).
        """
        target = Policy("target", experiment.subspace(), experiment.config.strength)
        examples = experiment.calibration[:N_MATCHING]
        found = teacher_forced(experiment.pair, examples, [target], progress=False)
        wanted = fmean(item.kl for item in found["target"])
        random = experiment.subspace().random_like(experiment.config.seed)
        policy = at_equal_kl(experiment.pair, random, examples, wanted, tolerance=KL_TOLERANCE)
        if policy is None:
            raise SPDError(
                f"no random subspace moves the model as far as SPD's (a KL of {wanted:.3g}); leave out "
                f"{self.name!r} or lower the strength"
            )
        return replace(policy, name=self.name)


def matched_in_energy(subspace: Subspace, moments: GradientMoments, seed: int) -> Subspace:
    """A random subspace whose blocks keep, as nearly as whole ranks allow, the activation energy that `subspace` keeps.

    Per block, directions of one random basis are taken until the next would overshoot by more than stopping short.
    """
    full = {
        site: [torch.eye(basis.shape[1], dtype=torch.float64)] * len(basis) for site, basis in subspace.bases.items()
    }
    drawn = Subspace.from_blocks(full, offset=subspace.offset, fingerprint=subspace.fingerprint).random_like(seed)
    chosen = {}
    for site in subspace.sites:
        gram = moments.blocks(site, subspace.bases[site].shape[0] > 1, of="activation")
        kept = _energy(subspace.bases[site], gram).sum(dim=1, keepdim=True)
        running = _energy(drawn.bases[site], gram).cumsum(dim=1)
        ranks = 1 + (running - kept).abs().argmin(dim=1)
        chosen[site] = [basis[:, :rank] for basis, rank in zip(drawn.bases[site], ranks.tolist(), strict=True)]
    return Subspace.from_blocks(chosen, drawn, origin={"random": seed, "matched": "activation energy"})


def _energy(basis: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """`vᵀ C v` of each direction: `[block, rank]`."""
    return einsum(basis, gram, basis, "block i r, block i j, block j r -> block r")
