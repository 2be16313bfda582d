"""Random subspaces: of the right shape, blind to the gradients, and matched in damage where they say so."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest
import torch

from spd_lens import methods
from spd_lens.evaluation.teacher_forced import teacher_forced
from spd_lens.methods.random import KL_TOLERANCE, N_MATCHING, matched_in_energy
from spd_lens.stats.intervals import mean_interval
from spd_lens.subspaces.policy import Policy
from tests.helpers import refused, sine


def orthonormal(subspace):
    for site, basis in subspace.bases.items():
        for block, rank in zip(basis, subspace.ranks[site], strict=True):
            gram = block.T @ block
            wanted = torch.diag((torch.arange(len(gram)) < rank).double())
            assert torch.allclose(gram, wanted, atol=1e-10)
    return True


def kept_share(subspace, moments, site, of="gradient"):
    """Share of each block's energy that lies in the subspace: tr(P C) / tr(C)."""
    gram = moments.blocks(site, of=of)
    kept = (subspace.projector(site) * gram).sum(dim=(1, 2))
    return kept / gram.diagonal(dim1=1, dim2=2).sum(dim=1)


def test_random_directions_have_spds_shape_and_the_seed_names_them(experiment, experiment_of):
    found, spd = methods.get("spd-random").projection(experiment), methods.get("spd").projection(experiment)
    assert found.subspace.ranks == spd.subspace.ranks and found.strength == spd.strength
    assert orthonormal(found.subspace)
    again = methods.get("spd-random").projection(experiment_of(experiment.pair))
    other = methods.get("spd-random").projection(experiment_of(experiment.pair, seed=1))
    for site in found.subspace.sites:
        assert torch.equal(found.subspace.bases[site], again.subspace.bases[site])
        assert min(map(sine, found.subspace.bases[site], other.subspace.bases[site])) > 0.1


def test_random_directions_know_nothing_of_the_gradients(experiment, experiment_of):
    """A uniformly random r-dimensional subspace keeps r/d of any energy in the mean; SPD's keeps far more."""
    moments = experiment.moments()
    random = [
        methods.get("spd-random").projection(experiment_of(experiment.pair, seed=seed)).subspace for seed in range(150)
    ]
    spd = methods.get("spd").projection(experiment).subspace
    for site in moments.sites:
        # blocks of one draw are independent of one another, but see different energies: one mean per draw
        shares = [kept_share(subspace, moments, site).mean().item() for subspace in random]
        interval = mean_interval(shares, confidence=0.999)
        assert interval.low <= 4 / 8 <= interval.high and interval.high - interval.low < 0.1
        assert kept_share(spd, moments, site).mean() > interval.high + 0.2


@pytest.mark.parametrize("per_head", [True, False])
def test_matched_in_energy_is_the_nearest_that_whole_ranks_allow(experiment, per_head):
    """Against a walk over all ranks of the same draw of a whole random basis."""
    moments = experiment.moments()
    spd = moments.subspace(0.5, per_head=per_head)
    full = moments.subspace(1.0, per_head=per_head)
    full = replace(full, ranks={site: (basis.shape[1],) * len(basis) for site, basis in full.bases.items()})
    for seed in range(3):
        found, drawn = matched_in_energy(spd, moments, seed), full.random_like(seed)
        assert orthonormal(found)
        assert found.origin["matched"] == "activation energy"
        for site in spd.sites:
            for block, gram in enumerate(moments.blocks(site, per_head, of="activation")):
                wanted = torch.trace(spd.projector(site)[block] @ gram)
                gaps = []
                for rank in range(1, len(gram) + 1):
                    basis = drawn.bases[site][block, :, :rank]
                    gaps.append((torch.trace(basis.T @ gram @ basis) - wanted).abs().item())
                nearest = 1 + gaps.index(min(gaps))
                assert found.ranks[site][block] == nearest
                chosen = found.bases[site][block, :, :nearest]
                assert torch.equal(chosen, drawn.bases[site][block, :, :nearest])


def test_the_method_matched_in_energy_keeps_spds_share(experiment):
    moments = experiment.moments()
    found = methods.get("spd-random-energy").projection(experiment).subspace
    plain = methods.get("spd-random").projection(experiment).subspace
    spd = methods.get("spd").projection(experiment).subspace
    for site in spd.sites:
        wanted = kept_share(spd, moments, site, of="activation")
        gap = (kept_share(found, moments, site, of="activation") - wanted).abs()
        # no direction of 8 carries more than this share, so the nearest whole rank is within half of it
        largest = max(torch.linalg.eigvalsh(gram)[-1] / gram.trace() for gram in moments.blocks(site, of="activation"))
        assert (gap <= largest / 2 + 1e-9).all()
    assert found.ranks != plain.ranks


def measured_kl(experiment, projection):
    policy = Policy("p", projection.subspace, projection.strength)
    items = teacher_forced(experiment.pair, experiment.calibration[:N_MATCHING], [policy], progress=False)["p"]
    return fmean(item.kl for item in items)


@pytest.mark.parametrize("seed", [1, 2])
def test_matched_in_kl_moves_the_model_as_far(experiment_of, any_tiny_pair, seed):
    own = experiment_of(any_tiny_pair, seed=seed, strength=0.7)
    spd, found = (methods.get(name).projection(own) for name in ("spd", "spd-random-kl"))
    wanted = measured_kl(own, spd)
    assert measured_kl(own, found) == pytest.approx(wanted, rel=KL_TOLERANCE)
    plain = methods.get("spd-random").projection(own)
    assert abs(measured_kl(own, plain) - wanted) > 2 * KL_TOLERANCE * wanted  # there was something to match
    assert 0 < found.strength < 1 and orthonormal(found.subspace)


def test_matched_in_kl_takes_fewer_directions_where_all_do_too_little(experiment, monkeypatch):
    """SPD's subspace replaced by one direction per head, which does more damage than half of all at random."""
    harsh = experiment.moments().subspace(1)
    monkeypatch.setattr(type(experiment), "subspace", lambda self: harsh.truncate(1))
    found = methods.get("spd-random-kl").projection(experiment)
    assert {rank for ranks in found.subspace.ranks.values() for rank in ranks} == {1}
    mild = experiment.subspace().random_like(0).select(harsh.sites[:1])
    monkeypatch.setattr(type(harsh), "random_like", lambda self, seed: mild)
    with refused("spd-random-kl", "lower the strength"):
        methods.get("spd-random-kl").projection(experiment)
