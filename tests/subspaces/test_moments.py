"""Moments: they add, split, keep, and know how many directions they hold."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spd_lens.examples import Example
from spd_lens.sites import Site
from spd_lens.subspaces.extract import extract
from spd_lens.subspaces.moments import GradientMoments
from spd_lens.subspaces.subspace import Subspace
from tests.helpers import EXAMPLES, reference_rows, refused, relative_error, sine

PER_SITE = ("gradient", "activation", "activation_sum", "gradient_sum")
PER_SHARD = ("n_tokens", "n_scored", "n_examples", "loss_sum")
ONE_TOKEN = Example(EXAMPLES[2].prompt, "C", [(0, 1)])


def taken(pair, examples=EXAMPLES, **options):
    return extract(pair, examples, engine="twin", progress=False, **options)


@pytest.fixture(scope="module")
def moments(tiny_qwen2_pair):
    return taken(tiny_qwen2_pair, shards=3)


def assert_same_sums(one, two, tolerance=1e-5):
    assert one.sites == two.sites
    for site in one.sites:
        for name in PER_SITE:
            assert relative_error(getattr(one, name)[site].sum(0), getattr(two, name)[site].sum(0)) < tolerance
    for name in PER_SHARD:
        assert getattr(one, name).sum().item() == pytest.approx(getattr(two, name).sum().item(), rel=tolerance)


def test_moments_of_two_sets_of_examples_add_up_to_those_of_their_union(tiny_pair):
    first, second = taken(tiny_pair, EXAMPLES[:3], shards=3), taken(tiny_pair, EXAMPLES[3:], shards=3)
    total, union = first + second, taken(tiny_pair, shards=3)
    assert_same_sums(total, union)
    for site in total.sites:  # three and three examples in three shards: the shards are the same too
        for shard in range(3):
            assert relative_error(total.gradient[site][shard], union.gradient[site][shard]) < 1e-5
    assert first.n_examples.tolist() == [1, 1, 1], "adding changed a summand"
    assert total.settings == first.settings


def test_pooled_moments_of_any_number_of_shards_add(tiny_pair, moments):
    pooled = moments.pooled()
    assert_same_sums(pooled, moments, tolerance=1e-12)
    assert pooled.n_shards == 1 and {
        getattr(pooled, name)[site].shape[0] for name in PER_SITE for site in pooled.sites
    } == {1}
    parts = moments.shards([0, 1]).pooled() + moments.shards([2]).pooled()
    assert_same_sums(parts, moments, tolerance=1e-12)


def test_the_sum_does_not_depend_on_the_number_of_shards(tiny_pair):
    assert_same_sums(taken(tiny_pair, shards=1), taken(tiny_pair, shards=8))


def test_every_example_goes_into_one_shard(moments):
    assert moments.n_examples.tolist() == [2, 2, 2]
    assert moments.n_shards == 3
    assert (moments.n_tokens > 0).all()


def test_each_gram_matrix_is_decomposed_once(tiny_pair, monkeypatch):
    moments, site = taken(tiny_pair, shards=2), Site(1, "v")
    decomposed = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: decomposed.append(gram) or eigh(gram))
    first = moments.subspace(2, sites=[site])
    again, values = moments.subspace(0.5, sites=[site]), moments.singular_values(site)
    assert len(decomposed) == 1
    assert torch.equal(values, first.singular_values[site])
    assert torch.equal(again[:2].bases[site], first.bases[site])
    values.zero_(), first.bases[site].zero_()  # what was handed out belongs to the caller
    assert torch.equal(moments.subspace(0.5, sites=[site]).bases[site], again.bases[site])
    assert torch.equal(moments.singular_values(site), again.singular_values[site])
    moments.singular_values(site, per_head=False), moments.subspace(2, sites=[site], of="activation")
    assert len(decomposed) == 3


def test_moments_that_have_changed_are_decomposed_again(tiny_pair):
    moments, site = taken(tiny_pair, shards=2), Site(1, "v")
    before = moments.singular_values(site)
    moments.gradient[site] *= 4
    assert torch.equal(moments.singular_values(site), 2 * before)
    width = moments.gradient[site].shape[-1]
    moments.add_tokens(site, 0, 1e3 * torch.eye(width), torch.zeros(width, width))
    assert (moments.singular_values(site) >= 1e3).all()
    assert not moments.shards([1])._spectra and not (moments + moments)._spectra


def test_chosen_shards_count_as_often_as_they_are_chosen(moments):
    picked = moments.shards([2, 0, 2])
    for site in moments.sites:
        expected = 2 * moments.gradient[site][2] + moments.gradient[site][0]
        assert torch.allclose(picked.gradient[site].sum(0), expected)
        assert torch.allclose(
            picked.mean(site), (2 * moments.activation_sum[site][2] + moments.activation_sum[site][0]).view(2, 8)
            / (2 * moments.n_tokens[2] + moments.n_tokens[0])
        )  # fmt: skip
    assert picked.n_examples.sum() == 6


def test_halves_are_disjoint_and_complete(tiny_pair):
    moments = taken(tiny_pair, shards=4)
    even, odd = moments.halves()
    assert even.n_examples.tolist() == [2, 1]
    assert odd.n_examples.tolist() == [2, 1]
    for site in moments.sites:
        both = even.gradient[site].sum(0) + odd.gradient[site].sum(0)
        assert torch.allclose(both, moments.gradient[site].sum(0))
        assert not torch.allclose(even.gradient[site].sum(0), odd.gradient[site].sum(0))


def test_saved_moments_come_back_bit_for_bit(moments, tmp_path):
    back = GradientMoments.load(moments.save(tmp_path / "new" / "m.safetensors"))
    for site in moments.sites:
        for name in PER_SITE:
            assert torch.equal(getattr(back, name)[site], getattr(moments, name)[site])
    for name in PER_SHARD:
        assert torch.equal(getattr(back, name), getattr(moments, name))
    assert back.fingerprint == moments.fingerprint
    assert back.settings == moments.settings
    assert back.n_heads == moments.n_heads
    assert (back + moments).n_examples.sum() == 12
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["m.safetensors"]


def test_per_head_moments_are_the_diagonal_blocks_of_the_joint_ones(moments):
    for site in moments.sites:
        joint = moments.blocks(site, per_head=False)
        heads = moments.blocks(site)
        assert joint.shape == (1, 16, 16)
        assert torch.equal(heads[0], joint[0, :8, :8])
        assert torch.equal(heads[1], joint[0, 8:, 8:])
        assert not torch.allclose(heads[0], heads[1])
        assert not torch.allclose(moments.blocks(site, of="activation"), heads)


def test_query_heads_are_counted_as_queries(tiny_pair):
    moments = taken(tiny_pair, kinds=("q", "k"), layers=2)
    assert moments.blocks(Site(2, "q")).shape == (4, 8, 8)
    assert moments.blocks(Site(2, "k")).shape == (2, 8, 8)


def test_mean_activation_is_the_mean_over_all_tokens(tiny_qwen2_pair, moments):
    pair = tiny_qwen2_pair
    _, activations, _ = reference_rows(pair.hf, [pair.encode(e) for e in EXAMPLES], moments.sites)
    for site in moments.sites:
        mean = activations[site].mean(dim=0)
        assert torch.allclose(moments.mean(site), mean.view(2, 8), rtol=1e-4, atol=1e-5)
        assert torch.allclose(moments.mean(site, per_head=False), mean[None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_rank_is_capped_at_what_the_gradients_have(pair_of, family, dtype):
    """One scored token reaches V of the last layer only through the query heads that read a KV head: two of them."""
    pair = pair_of(family, "auto", dtype)
    moments = taken(pair, [ONE_TOKEN], layers=[3], kinds=("v", "q"))
    v, q = Site(3, "v"), Site(3, "q")
    assert int(moments.n_scored.sum()) == 1
    per_head, joint = moments.subspace(1.0), moments.subspace(1.0, per_head=False)
    assert per_head.ranks == {v: (2, 2), q: (1, 1, 1, 1)}
    assert joint.ranks == {v: (4,), q: (1,)}
    assert per_head.rank == 1.0, "what was asked for is kept beside what there was"
    assert per_head.bases[v].shape == (2, 8, 2)
    rows = reference_rows(pair.hf, [pair.encode(ONE_TOKEN)], [v])[0][v]
    for head, g in enumerate(rows.split(8, dim=1)):
        right = torch.linalg.svd(g).Vh[:2].T
        assert sine(per_head.bases[v][head], right) < (0.05 if dtype == "bfloat16" else 1e-4)
    assert moments.subspace(1).ranks[v] == (1, 1)


def test_blocks_of_different_rank_are_padded_with_zeros_and_not_with_directions(tiny_pair):
    moments = taken(tiny_pair, [ONE_TOKEN], layers=[3], kinds="v")
    site = Site(3, "v")
    moments.gradient[site][:, 8:, 8:] = 0  # the second head is not used
    subspace = moments.subspace(4)
    assert subspace.ranks[site] == (2, 0)
    assert subspace.bases[site].shape == (2, 8, 2)
    assert (subspace.bases[site][1] == 0).all()
    moments.gradient[site][:] = 0
    with refused("3.v", "zero"):
        moments.subspace(4)


def test_signs_are_fixed_so_that_the_same_moments_give_the_same_file(moments, tmp_path):
    one, two = moments.subspace(), moments.subspace()
    for site in one.sites:
        assert torch.equal(one.bases[site], two.bases[site])
        largest = one.bases[site].gather(1, one.bases[site].abs().argmax(dim=1, keepdim=True))
        assert (largest > 0).all()
    first, second = one.save(tmp_path / "1"), two.save(tmp_path / "2")
    assert first.read_bytes() == second.read_bytes()


def test_a_subspace_of_some_sites(moments):
    subspace = moments.subspace(sites=[Site(3, "v")])
    assert subspace.sites == [Site(3, "v")]
    with refused("2.k", "1.k"):
        moments.subspace(sites=[Site(2, "k")])


def test_origin_tells_how_the_subspace_was_made(moments):
    subspace = moments.subspace(0.25)
    assert subspace.rank == 0.25
    assert subspace.fingerprint == moments.fingerprint
    assert subspace.origin["loss"] == "aligned"
    assert subspace.origin["dtype"] == "float32"
    assert subspace.origin["n_examples"] == 6
    assert subspace.origin["n_tokens"] == int(moments.n_tokens.sum())


def test_moments_that_do_not_belong_together_do_not_add(tiny_pair, moments):
    mine = taken(tiny_pair, EXAMPLES[:2], shards=3)
    with refused("loss", "aligned", "full"):
        mine + taken(tiny_pair, EXAMPLES[:2], shards=3, loss="full")
    with refused("n_shards", 3, 2):
        mine + taken(tiny_pair, EXAMPLES[:2], shards=2)
    with refused("sites", "layer=2"):
        mine + taken(tiny_pair, EXAMPLES[:2], shards=3, layers=[2])
    with refused("another model of the same shape"):
        mine + moments
    with pytest.raises(TypeError):
        mine + 1


def test_shards_that_do_not_exist(tiny_pair, moments):
    with refused("[0, 3]", "0 to 2"):
        moments.shards([0, 3])
    with refused("[]"):
        moments.shards([])
    with refused("-1"):
        moments.shards([-1])
    with refused("shards=2"):
        taken(tiny_pair, EXAMPLES[:1], shards=1).halves()


def test_moments_of_nothing_have_no_subspace(tiny_pair):
    with refused("no examples"):
        GradientMoments.empty(tiny_pair.fingerprint, [Site(1, "k")], 2, {}).subspace()


# gradients around their mean


def of_rows(pair, rows, dtype="float64"):
    """Moments of given rows of one site, in two shards."""
    site = Site(1, "k")
    made = GradientMoments.empty(pair.fingerprint, [site], 2, {"dtype": dtype})
    for shard, part in enumerate(rows.tensor_split(2)):
        made.add_tokens(site, shard, part, torch.zeros_like(part))
        made.n_tokens[shard] += len(part)
        made.n_examples[shard] += 1
    return site, made


def right_vectors(rows):
    """Singular values and right singular vectors, as columns, of rows around their mean, in plain float64."""
    _, values, right = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False)
    return values, right.T


def drawn_rows(seed=0, shift=1.0, n=40):
    generator = torch.Generator().manual_seed(seed)
    spread = (
        torch.randn(n, 16, generator=generator, dtype=torch.float64) @ torch.diag(0.7 ** torch.arange(16.0)).double()
    )
    return spread + shift * torch.randn(16, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("per_head", [True, False], ids=["per head", "joint"])
def test_centred_moments_are_those_of_the_rows_without_their_mean(tiny_qwen2_pair, moments, per_head):
    pair = tiny_qwen2_pair
    gradients, _, _ = reference_rows(pair.hf, [pair.encode(e) for e in EXAMPLES], moments.sites)
    subspace = moments.subspace(3, per_head=per_head, center_gradients=True)
    for site, g in gradients.items():
        found = moments.blocks(site, per_head, center_gradients=True)
        for block, rows in enumerate(g.split(8 if per_head else 16, dim=1)):
            around = rows - rows.mean(dim=0)
            assert relative_error(found[block], around.T @ around) < 1e-5
            assert relative_error(rows.T @ rows, around.T @ around) > 1e-4, "the mean makes no difference here"
            values, right = right_vectors(rows)
            assert torch.allclose(subspace.singular_values[site][block], values, rtol=1e-3, atol=1e-4 * values[0])
            assert torch.equal(
                moments.singular_values(site, per_head, center_gradients=True), subspace.singular_values[site]
            )
            assert sine(subspace.bases[site][block], right[:, :3]) < 1e-4


def test_the_mean_is_that_of_all_chosen_shards(tiny_pair):
    rows = drawn_rows(n=41)
    site, moments = of_rows(tiny_pair, rows)
    first, second = rows.tensor_split(2)
    for chosen, expected in (([0], first), ([1, 0, 1], torch.cat([second, first, second]))):
        around = expected - expected.mean(dim=0)
        found = moments.shards(chosen).blocks(site, False, center_gradients=True)[0]
        assert relative_error(found, around.T @ around) < 1e-12
    halves = [half.blocks(site, False, center_gradients=True) for half in moments.halves()]
    assert relative_error(sum(halves), moments.blocks(site, False, center_gradients=True)) > 0.01, "two means, not one"
    total = (moments + moments).blocks(site, False, center_gradients=True)
    assert relative_error(total, 2 * moments.blocks(site, False, center_gradients=True)) < 1e-12


@pytest.mark.parametrize("shift", [0.0, 1e2, 1e6])
def test_what_the_subtraction_costs_is_what_it_says(tiny_pair, shift):
    """The moments are off by some 2⁻⁵² of those of the rows before centring: what stands above that is right."""
    rows = drawn_rows(shift=shift)
    site, moments = of_rows(tiny_pair, rows)
    values, right = right_vectors(rows)
    size = rows.norm()
    error = (moments.blocks(site, False, center_gradients=True)[0] - right * values.square() @ right.T).norm()
    assert error < 16 * 2**-52 * size**2
    subspace = moments.subspace(1.0, per_head=False, center_gradients=True)
    kept = subspace.ranks[site][0]
    assert kept == int((values > (16 * 2**-52) ** 0.5 * size).sum())
    assert kept == 16 if shift <= 1e2 else 3 < kept < 16
    gap = values[2] ** 2 - values[3] ** 2
    assert sine(subspace.blocks(site)[0][:, :3], right[:, :3]) < 2 * error / gap + 1e-12  # Davis-Kahan


def test_rounding_is_that_of_the_rows_before_their_mean_was_taken_off(tiny_pair):
    rows = drawn_rows(shift=20.0)
    values, _ = right_vectors(rows)
    limit = torch.finfo(torch.bfloat16).eps * rows.norm() / 16**0.5
    site, moments = of_rows(tiny_pair, rows, "bfloat16")
    expected = int((values > limit).sum())
    assert 3 < expected < 16
    assert moments.subspace(1.0, per_head=False, center_gradients=True).ranks[site] == (expected,)


def test_rows_that_are_all_alike_leave_nothing(tiny_pair):
    site, moments = of_rows(tiny_pair, drawn_rows()[:1].expand(6, 16))
    assert moments.subspace(4, per_head=False).ranks[site] == (1,)
    with refused("1.k", "without their mean"):
        moments.subspace(4, per_head=False, center_gradients=True)


def test_moments_of_an_earlier_version_load_and_add_but_are_not_centred(moments, tmp_path):
    old = GradientMoments.load(Path(__file__).parents[1] / "fixtures/artefacts/moments.safetensors")
    assert not old.gradient_sum
    again = GradientMoments.load(old.save(tmp_path / "again.safetensors"))
    for one in (old, again, old + old, *old.halves(), old.shards([0])):
        assert one.subspace(1).sites == old.sites
        with refused("sums of gradients", "extract them again"):
            one.subspace(1, center_gradients=True)
    before = replace(moments, gradient_sum={})
    for mixed in (before + moments, moments + before):
        assert not mixed.gradient_sum
        site = mixed.sites[0]
        assert torch.equal(mixed.blocks(site), 2 * moments.blocks(site))
        with refused("sums of gradients"):
            mixed.singular_values(site, center_gradients=True)


def test_centring_is_recorded_where_it_was_done(moments):
    assert "center_gradients" not in moments.subspace().origin
    assert moments.subspace(center_gradients=True).origin["center_gradients"] is True
    plain, asked = (moments.subspace(of="activation", center_gradients=value) for value in (False, True))
    assert asked.origin == plain.origin and asked.digest() == plain.digest()
    assert moments.subspace(center_gradients=True).digest() != moments.subspace().digest()
    assert moments.subspace().digest() == replace(moments, gradient_sum={}).subspace().digest()


# a share of energy in the place of a rank


@pytest.mark.parametrize("per_head", [True, False], ids=["per head", "joint"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.95, 0.999])
def test_a_share_of_energy_takes_the_fewest_directions_that_hold_it(moments, per_head, share):
    subspace = moments.subspace(energy=share, per_head=per_head)
    for site in moments.sites:
        for block, values in enumerate(moments.singular_values(site, per_head).tolist()):
            total, reached, rank = sum(value**2 for value in values), 0.0, 0
            while reached < share * total:
                reached += values[rank] ** 2
                rank += 1
            assert subspace.ranks[site][block] == rank
            of_rank = moments.subspace(rank, per_head=per_head).blocks(site)[block]
            assert torch.equal(subspace.blocks(site)[block], of_rank)


def test_ranks_differ_from_block_to_block_and_the_file_keeps_what_was_asked_for(moments, tmp_path):
    subspace = moments.subspace(energy=0.95)
    assert len({rank for ranks in subspace.ranks.values() for rank in ranks}) > 1
    assert subspace.rank is None and subspace.origin["energy"] == 0.95
    back = Subspace.load(subspace.save(tmp_path / "s.safetensors"))
    assert (back.ranks, back.rank, back.origin) == (subspace.ranks, None, subspace.origin)
    assert back.digest() == subspace.digest()
    assert "energy" not in moments.subspace().origin and moments.subspace().rank == 0.5
    assert moments.subspace(2, energy=0.95).digest() == subspace.digest(), "the energy takes the rank's place"


def test_a_share_of_all_energy_is_capped_where_rounding_begins(tiny_pair):
    moments = taken(tiny_pair, [ONE_TOKEN], layers=[3], kinds="v")
    assert moments.subspace(energy=1.0).ranks == moments.subspace(1.0).ranks == {Site(3, "v"): (2, 2)}
    moments.gradient[Site(3, "v")][:, 8:, 8:] = 0  # the second head is not used
    assert moments.subspace(energy=0.5).ranks[Site(3, "v")][1] == 0


@pytest.mark.parametrize("energy", [0, 0.0, -0.5, 1.5, 2, float("nan"), True, "0.95", [0.5]])
def test_a_share_that_is_none_is_refused(moments, energy):
    with refused("energy", "(0, 1]", "0.95"):
        moments.subspace(energy=energy)
    assert moments.subspace(energy=1).origin["energy"] == 1.0
