"""`Subspace`: projectors are projectors, and what is asked of a frozen, callable, sliceable, savable thing."""

import dataclasses

import pytest
import torch

from spd_lens.files import load_tensors, save_tensors
from spd_lens.sites import Site
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.subspace import FORMAT, Subspace, resolve_rank
from tests.helpers import EXAMPLES, refused

SITE = Site(1, "k")


@pytest.fixture(scope="module")
def moments(tiny_qwen2_pair):
    return extract(tiny_qwen2_pair, EXAMPLES, engine="twin", kinds=("k", "v", "q"), progress=False)


@pytest.fixture(params=["per head", "joint", "centred"])
def subspace(request, moments):
    return moments.subspace(3, per_head=request.param != "joint", center=request.param == "centred")


def activation(heads=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, heads, 8, generator=generator, dtype=torch.float64).to(dtype)


def test_projectors_are_symmetric_idempotent_and_of_their_rank(subspace):
    for site in subspace.sites:
        projector = subspace.projector(site)
        assert torch.allclose(projector @ projector, projector, atol=1e-12)
        assert torch.allclose(projector, projector.mT, atol=1e-12)
        traces = projector.diagonal(dim1=1, dim2=2).sum(dim=1)
        assert traces.tolist() == pytest.approx(list(subspace.ranks[site]), abs=1e-9)
        assert subspace.ranks[site] == (3,) * projector.shape[0]


def test_applying_it_twice_is_applying_it_once_and_is_the_explicit_formula(subspace):
    for site in subspace.sites:
        x = activation(4 if site.kind == "q" else 2)
        y = subspace(x, site)
        assert y.shape == x.shape
        assert torch.allclose(subspace(y, site), y, atol=1e-12)
        assert not torch.allclose(y, x, atol=0.1)
        projector = subspace.projector(site)
        blocks = x.reshape(3, 5, projector.shape[0], -1)
        mean = subspace.offset.get(site, torch.zeros(projector.shape[:2], dtype=torch.float64))
        expected = torch.stack(
            [(blocks[:, :, b] - mean[b]) @ projector[b] + mean[b] for b in range(len(projector))], dim=2
        )
        assert torch.allclose(y, expected.reshape(x.shape), atol=1e-12)


def test_the_affine_map_is_what_calling_it_does(subspace):
    for strength in (0.3, 1.0):
        for site in subspace.sites:
            x = activation(4 if site.kind == "q" else 2)
            matrix, constant = subspace.affine(site, strength)
            blocks = x.reshape(3, 5, matrix.shape[0], -1)
            expected = torch.stack([blocks[:, :, b] @ matrix[b] + constant[b] for b in range(len(matrix))], dim=2)
            assert torch.allclose(subspace(x, site, strength), expected.reshape(x.shape), atol=1e-12)
            assert torch.allclose(matrix, matrix.mT)


def test_per_head_projectors_do_not_mix_heads_and_joint_ones_do(moments):
    x = activation()
    moved = x.clone()
    moved[:, :, 1] += 1
    per_head, joint = moments.subspace(3), moments.subspace(3, per_head=False)
    assert per_head.per_head
    assert not joint.per_head
    assert torch.equal(per_head(x, SITE)[:, :, 0], per_head(moved, SITE)[:, :, 0])
    assert not torch.allclose(joint(x, SITE)[:, :, 0], joint(moved, SITE)[:, :, 0])
    assert per_head.bases[SITE].shape == (2, 8, 3)
    assert joint.bases[SITE].shape == (1, 16, 3)


def test_a_centred_projection_leaves_the_mean_where_it_is(moments):
    centred, plain = moments.subspace(3, center=True), moments.subspace(3)
    for site in (SITE, Site(3, "v")):
        mean = moments.mean(site)
        assert torch.allclose(centred(mean, site), mean)
        assert not torch.allclose(plain(mean, site), mean)
        assert torch.allclose(plain(torch.zeros_like(mean), site), torch.zeros_like(mean))


def test_strength_zero_returns_the_very_tensor(subspace):
    x = activation()
    assert subspace(x, SITE, 0.0) is x
    assert subspace(x, SITE, 0) is x


def test_strength_is_linear(subspace):
    x = activation()
    full = subspace(x, SITE)
    for strength in (0.25, 0.5, 0.9):
        assert torch.allclose(subspace(x, SITE, strength), (1 - strength) * x + strength * full, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_dtype_that_goes_in_comes_out(subspace, dtype):
    x = activation(dtype=dtype)
    y = subspace(x, SITE)
    assert y.dtype == dtype
    exact = subspace(x.double(), SITE)
    # rounded once, at the end: within half a unit in the last place, and float32's own error
    assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6).all()


def test_slicing_and_truncating_are_asking_for_less(moments, subspace):
    fresh = moments.subspace(2, per_head=subspace.per_head, center=bool(subspace.offset))
    for smaller in (subspace[:2], subspace.truncate(2)):
        assert smaller.ranks == fresh.ranks
        assert smaller.rank == 2
        for site in smaller.sites:
            assert torch.equal(smaller.bases[site], fresh.bases[site])
            assert torch.equal(smaller.singular_values[site], subspace.singular_values[site])
    assert subspace[:] is subspace
    assert subspace.truncate(1.0).ranks == subspace.ranks, "never more than it has"
    assert moments.subspace(8).truncate(0.25).ranks[SITE] == (2, 2)
    assert subspace.ranks[SITE] == (3,) * len(subspace.ranks[SITE]), "the original stays"


def test_nested_ranks_are_nested_spaces(moments):
    x = activation()
    big, small = moments.subspace(6), moments.subspace(2)
    assert torch.allclose(big(small(x, SITE), SITE), small(x, SITE), atol=1e-12)
    assert torch.allclose(moments.subspace(8)(x, SITE), x, atol=1e-12), "full rank is the identity"


def test_truncating_blocks_of_different_rank():
    basis = torch.zeros(2, 4, 3, dtype=torch.float64)
    basis[0] = torch.eye(4, dtype=torch.float64)[:, :3]
    basis[1, 0, 0] = 1
    subspace = Subspace(bases={SITE: basis}, ranks={SITE: (3, 1)})
    smaller = subspace[:2]
    assert smaller.ranks[SITE] == (2, 1)
    assert smaller.bases[SITE].shape == (2, 4, 2)
    assert (smaller.bases[SITE][1, :, 1] == 0).all()


def test_a_random_subspace_has_the_same_ranks_and_other_directions(subspace):
    random, again, other = subspace.random_like(1), subspace.random_like(1), subspace.random_like(2)
    assert random.ranks == subspace.ranks
    assert random.offset == subspace.offset
    for site in subspace.sites:
        basis = random.bases[site]
        assert basis.shape == subspace.bases[site].shape
        gram = basis.mT @ basis
        assert torch.allclose(gram, torch.eye(3, dtype=torch.float64).expand_as(gram), atol=1e-12)
        assert torch.equal(basis, again.bases[site])
        assert not torch.allclose(random.projector(site), other.projector(site), atol=0.1)
        assert not torch.allclose(random.projector(site), subspace.projector(site), atol=0.1)
    assert not torch.allclose(random.projector(SITE), random.projector(Site(1, "v")), atol=0.1)
    assert random.singular_values == {}
    assert random.origin == {"random": 1}


def test_a_random_subspace_keeps_blocks_of_different_rank():
    basis = torch.zeros(2, 4, 3, dtype=torch.float64)
    basis[0] = torch.eye(4, dtype=torch.float64)[:, :3]
    basis[1, 0, 0] = 1
    random = Subspace(bases={SITE: basis}, ranks={SITE: (3, 1)}).random_like(0)
    assert random.projector(SITE).diagonal(dim1=1, dim2=2).sum(1).tolist() == pytest.approx([3, 1])


def test_random_directions_are_uniform():
    """On average over seeds the projector is rank / width times the identity."""
    basis = torch.eye(4, dtype=torch.float64)[None, :, :2]
    subspace = Subspace(bases={SITE: basis}, ranks={SITE: (2,)})
    mean = torch.stack([subspace.random_like(seed).projector(SITE)[0] for seed in range(400)]).mean(0)
    assert torch.allclose(mean, 0.5 * torch.eye(4, dtype=torch.float64), atol=0.1)


def test_saved_and_loaded_it_is_the_same(subspace, tmp_path):
    back = Subspace.load(subspace.save(tmp_path / "s.safetensors"))
    for name in ("bases", "singular_values", "offset"):
        mine, theirs = getattr(subspace, name), getattr(back, name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[site], theirs[site]) for site in mine)
    for name in ("ranks", "rank", "fingerprint", "origin"):
        assert getattr(back, name) == getattr(subspace, name)
    assert torch.equal(back(activation(), SITE), subspace(activation(), SITE))


def test_it_is_frozen(subspace):
    with pytest.raises(dataclasses.FrozenInstanceError):
        subspace.rank = 1


def test_selecting_sites(subspace):
    part = subspace.select([Site(3, "v")])
    assert part.sites == [Site(3, "v")]
    assert part.singular_values.keys() == part.ranks.keys() == part.bases.keys()
    with refused("2.k", "1.k"):
        subspace.select([Site(2, "k")])


@pytest.mark.parametrize(
    ("rank", "width", "directions"), [(0.5, 16, 8), (0.5, 7, 3), (1.0, 8, 8), (0.01, 8, 1), (0.3, 10, 3), (5, 8, 5)]
)
def test_ranks_and_fractions(rank, width, directions):
    assert resolve_rank(rank, width) == directions


@pytest.mark.parametrize("rank", [0, -1, 9, 0.0, 1.5, -0.5, float("nan"), True, "half", None])
def test_ranks_that_do_not_exist(moments, subspace, rank):
    with refused(f"rank {rank!r}"):
        moments.subspace(rank)
    with refused(f"rank {rank!r}"):
        moments.subspace(8).truncate(rank)


def test_slices_that_make_no_sense(subspace):
    for wrong in (slice(1, 3), slice(None, 4, 2), 3):
        with refused("subspace[:16]"):
            subspace[wrong]
    for stop in (0, -1):
        with refused(f"rank {stop}"):
            subspace[:stop]


def test_a_subspace_needs_bases_of_the_right_form():
    with refused("at least one site"):
        Subspace(bases={}, ranks={})
    with refused("1.k", "(8, 3)"):
        Subspace(bases={SITE: torch.eye(8)[:, :3]}, ranks={SITE: (3,)})
    with refused("1.k"):
        Subspace(bases={SITE: torch.eye(8)[None]}, ranks={SITE: (8, 8)})


def test_blocks_of_a_subspace_make_it_again():
    q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    blocks = [q[:, :3], q[:, :0], q[:, 3:4]]
    subspace = Subspace.from_blocks({SITE: blocks}, rank=3, origin={"random": 1})
    assert subspace.ranks == {SITE: (3, 0, 1)} and subspace.bases[SITE].shape == (3, 8, 3)
    assert not subspace.bases[SITE][1].any() and not subspace.bases[SITE][2, :, 1:].any()
    assert all(torch.equal(mine, given) for mine, given in zip(subspace.blocks(SITE), blocks, strict=True))
    fewer = Subspace.from_blocks({SITE: [block[:, :1] for block in blocks]}, subspace, rank=1)
    assert (fewer.ranks[SITE], fewer.rank, fewer.origin) == ((1, 0, 1), 1, {"random": 1})
    blocks[0].zero_()
    assert subspace.bases[SITE][0].any(), "the subspace shares memory with what it was made of"


def test_provenance_is_kept_by_what_is_the_same_in_part_and_by_nothing_else(moments, tmp_path):
    known = {"model": "tiny", "data": {"train.jsonl": "ab"}, "examples": "cd"}
    subspace = dataclasses.replace(moments.subspace(3), provenance=known)
    path = subspace.save(tmp_path / "s.safetensors")
    assert Subspace.load(path).provenance == subspace[:2].provenance == subspace.select([SITE]).provenance == known
    others = (subspace.random_like(1), ~subspace, subspace | subspace[:2], moments.subspace(3))
    assert [other.provenance for other in others] == [{}] * 4
    _, header = load_tensors(path, "a subspace")
    assert header["grade"] == "none" and header["written_by"].startswith("spd_lens ")


def test_a_newer_format_is_refused_by_its_number(moments, tmp_path):
    path = moments.subspace(3).save(tmp_path / "s.safetensors")
    tensors, header = load_tensors(path, "a subspace")
    newer = {**header, "format": FORMAT + 1, "written_by": "spd_lens 99.0", "ranks": "in another form"}
    save_tensors(path, "a subspace", tensors, newer)
    with refused("s.safetensors", f"format {FORMAT + 1}", "spd_lens 99.0", "upgrade"):
        Subspace.load(path)
    save_tensors(path, "a subspace", tensors, {k: v for k, v in header.items() if k not in ("format", "provenance")})
    assert Subspace.load(path).provenance == {}
