"""Union, intersection and complement on subspaces whose answer is known."""

import math

import pytest
import torch

from spd_lens.sites import Site
from spd_lens.subspaces.subspace import Subspace
from tests.helpers import refused

K, V = Site(1, "k"), Site(1, "v")
E = torch.eye(6, dtype=torch.float64)


def spanned(*blocks, site=K, **fields):
    """A subspace from each block's orthonormal columns."""
    width = max(block.shape[1] for block in blocks)
    basis = torch.zeros(len(blocks), 6, width, dtype=torch.float64)
    for place, block in zip(basis, blocks, strict=True):
        place[:, : block.shape[1]] = block
    return Subspace({site: basis}, {site: tuple(block.shape[1] for block in blocks)}, **fields)


def rotation(seed):
    return torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def projector(columns):
    return columns @ torch.linalg.pinv(columns)


@pytest.mark.parametrize("seed", range(3))
def test_of_coordinate_subspaces_in_a_rotated_frame(seed):
    q = rotation(seed)
    a = spanned(q[:, [0, 1, 2]], q[:, [0]])
    b = spanned(q[:, [2, 3, 1]], q[:, [4, 5]])
    both, shared, rest = a | b, a & b, ~a
    assert both.ranks[K] == (4, 3)
    assert torch.allclose(both.projector(K)[0], projector(q[:, :4]), atol=1e-12)
    assert torch.allclose(both.projector(K)[1], projector(q[:, [0, 4, 5]]), atol=1e-12)
    assert shared.ranks[K] == (2, 0)
    assert torch.allclose(shared.projector(K)[0], projector(q[:, [1, 2]]), atol=1e-12)
    assert not shared.projector(K)[1].any()
    assert rest.ranks[K] == (3, 5)
    assert torch.allclose(rest.projector(K) + a.projector(K), torch.eye(6, dtype=torch.float64), atol=1e-12)


def test_bases_stay_orthonormal():
    a, b = spanned(rotation(1)[:, :2]), spanned(rotation(2)[:, :3])
    for made in (a | b, ~a, a.intersection(b, 1.5)):
        basis = made.bases[K][0, :, : made.ranks[K][0]]
        assert torch.allclose(basis.T @ basis, torch.eye(made.ranks[K][0], dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("degrees", [30.0, 5.0, 0.001])
def test_the_tolerance_is_an_angle(degrees):
    angle = math.radians(degrees)
    a = spanned(E[:, [0, 3]])
    b = spanned(torch.stack([math.cos(angle) * E[0] + math.sin(angle) * E[1], E[4]], dim=1))
    assert a.intersection(b, 0.99 * angle).ranks[K] == (0,)
    near = a.intersection(b, 1.01 * angle)
    assert near.ranks[K] == (1,)
    bisector = math.cos(angle / 2) * E[0] + math.sin(angle / 2) * E[1]
    assert torch.allclose(near.projector(K)[0], torch.outer(bisector, bisector), atol=1e-9)
    assert a.union(b, 0.99 * angle).ranks[K] == (4,)
    assert a.union(b, 1.01 * angle).ranks[K] == (3,)


def test_de_morgan():
    q = rotation(5)
    a, b = spanned(q[:, :3]), spanned(q[:, 2:5])
    assert torch.allclose((~(a | b)).projector(K), (~a & ~b).projector(K), atol=1e-12)
    assert torch.allclose((~~a).projector(K), a.projector(K), atol=1e-12)


def test_a_subspace_with_itself():
    a = spanned(rotation(3)[:, :3], rotation(4)[:, :2])
    for made in (a | a, a & a):
        assert made.ranks == a.ranks
        assert torch.allclose(made.projector(K), a.projector(K), atol=1e-12)


def test_sites_of_one_alone():
    """What a subspace does not project it keeps whole."""
    a, b = spanned(E[:, :2]), spanned(E[:, :3], site=V)
    assert (a & b).ranks == {K: (2,), V: (3,)}
    with refused("no site in common"):
        a | b
    c = Subspace({**a.bases, **b.bases}, {**a.ranks, **b.ranks})
    assert (a | c).sites == [K]


def test_the_complement_of_everything_is_nothing_and_the_other_way_round():
    everything = spanned(rotation(0))
    nothing = ~everything
    assert nothing.ranks[K] == (0,)
    assert (~nothing).ranks[K] == (6,)
    x = torch.randn(2, 3, 1, 6, dtype=torch.float64)
    assert not nothing(x, K).any()
    assert torch.allclose((~nothing)(x, K), x, atol=1e-12)


def test_complement_and_projection_add_up_to_the_identity_around_a_mean(tmp_path):
    mean = torch.randn(1, 6, dtype=torch.float64)
    a = spanned(rotation(0)[:, :2], offset={K: mean})
    x = torch.randn(4, 1, 6, dtype=torch.float64)
    assert torch.allclose(a(x, K) + a.complement()(x, K), x + mean, atol=1e-12)
    again = Subspace.load((~a).save(tmp_path / "rest.safetensors"))
    assert torch.equal(again.bases[K], (~a).bases[K])


def test_refusals():
    a = spanned(E[:, :2])
    with refused("1 blocks of width 6", "2 of 6"):
        a & spanned(E[:, :2], E[:, :1])
    with refused("centred differently", "1.k"):
        a | spanned(E[:, :2], offset={K: torch.ones(1, 6, dtype=torch.float64)})
    with refused("tolerance 2.0"):
        a.intersection(a, 2.0)
    with pytest.raises(TypeError):
        a | 3
