"""Policies at one KL: against a plain scan of strengths, one pass for each."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest

from spd_lens.evaluation import matching
from spd_lens.evaluation.matching import KL_TOLERANCE, all_at_equal_kl, at_equal_kl
from spd_lens.evaluation.teacher_forced import teacher_forced
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.policy import Policy
from tests.helpers import EXAMPLES, refused

TEXTS = EXAMPLES[2:5]


def kl_of(pair, subspace, strength=1.0):
    policy = Policy("p", subspace, strength)
    return fmean(item.kl for item in teacher_forced(pair, TEXTS, [policy], progress=False)["p"])


@pytest.fixture(scope="module")
def subspace(tiny_pair):
    return extract(tiny_pair, EXAMPLES, progress=False).subspace(0.5)


def test_the_strength_is_the_one_that_a_scan_finds(tiny_pair, subspace):
    strengths = np.linspace(0, 1, 41)
    scan = [kl_of(tiny_pair, subspace, s) if s else 0.0 for s in strengths]
    assert scan == sorted(scan)
    for share in (0.1, 0.4, 0.9):
        wanted = share * scan[-1]
        found = at_equal_kl(tiny_pair, subspace, TEXTS, wanted)
        assert kl_of(tiny_pair, subspace, found.strength) == pytest.approx(wanted, rel=KL_TOLERANCE)
        nearest = np.interp(wanted, scan, strengths)
        assert found.strength == pytest.approx(nearest, rel=KL_TOLERANCE, abs=1 / 40)
        assert found.subspace is subspace
        tighter = at_equal_kl(tiny_pair, subspace, TEXTS, wanted, tolerance=0.001)
        assert kl_of(tiny_pair, subspace, tighter.strength) == pytest.approx(wanted, rel=0.001)


def test_where_full_strength_is_too_little_fewer_directions_are_kept(tiny_pair, subspace):
    by_rank = {rank: kl_of(tiny_pair, subspace.truncate(rank)) for rank in (4, 3, 2, 1)}
    wanted = (by_rank[4] + by_rank[2]) / 2
    assert by_rank[4] < wanted * (1 - KL_TOLERANCE)
    found = at_equal_kl(tiny_pair, subspace, TEXTS, wanted)
    expected = next(rank for rank in (4, 3, 2, 1) if by_rank[rank] >= wanted * (1 - KL_TOLERANCE))
    assert {rank for ranks in found.subspace.ranks.values() for rank in ranks} == {expected}
    assert kl_of(tiny_pair, found.subspace, found.strength) == pytest.approx(wanted, rel=KL_TOLERANCE)
    assert at_equal_kl(tiny_pair, subspace, TEXTS, 2 * max(by_rank.values())) is None


def test_side_by_side_they_are_the_same(tiny_pair, subspace):
    others = {"own": subspace, "random": subspace.random_like(1), "weak": subspace.random_like(2).truncate(1)}
    wanted = kl_of(tiny_pair, subspace) / 2
    together = all_at_equal_kl(tiny_pair, others, TEXTS, wanted)
    assert list(together) == list(others)
    for name, policy in together.items():
        alone = at_equal_kl(tiny_pair, others[name], TEXTS, wanted)
        assert policy.name == name and policy.strength == alone.strength


def test_what_cannot_be_matched_is_refused(tiny_pair, subspace, monkeypatch):
    for kl in (0.0, -1.0, float("nan"), float("inf")):
        with refused("KL", kl):
            at_equal_kl(tiny_pair, subspace, TEXTS, kl)
    for tolerance in (0, 1, -0.1):
        with refused("tolerance", tolerance):
            at_equal_kl(tiny_pair, subspace, TEXTS, 0.1, tolerance=tolerance)

    def broken(pair, texts, policies, **_options):
        items = teacher_forced(pair, TEXTS[:1], policies, progress=False)
        return {name: [type(rows[0])("x", 0.0, 0.0, float("inf"), 0.0)] for name, rows in items.items()}

    monkeypatch.setattr(matching, "teacher_forced", broken)
    with refused("projected", "inf", "float32"):
        at_equal_kl(tiny_pair, subspace, TEXTS, 0.1)
