"""Curves over the rank against plain numpy, one rank at a time, and constructed cases with known answers."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from spd_lens.analysis.common.angles import cosine_by_rank
from spd_lens.analysis.dashboard.document import from_sources, on_grid, rank_grid
from spd_lens.analysis.dashboard.rank_curves import (
    SiteDirections,
    Source,
    jackknife_band,
    shares,
    split_half,
)
from spd_lens.sites import Site
from spd_lens.subspaces import energies_of


@pytest.fixture(scope="module")
def moments(finished_run):
    return finished_run.moments


def directions_of(gram):
    energies, vectors = torch.linalg.eigh(gram)
    return SiteDirections(vectors.flip(-1), energies.flip(-1).clamp_min(0), gram)


def random_gram(seed, width=6, rows=9):
    rows = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rows.T @ rows)[None]


@pytest.mark.parametrize("per_head", [True, False])
def test_curves_are_the_plain_sums_at_every_rank(moments, per_head):
    for site in moments.sites:
        gradient = moments.gradient[site].sum(0).numpy()
        activation = moments.activation[site].sum(0).numpy()
        width = gradient.shape[0] // (moments.n_heads[site] if per_head else 1)
        found = SiteDirections.of(moments, site, per_head)
        kept = found.held(found.activation)
        for block in range(found.n_blocks):
            part = slice(block * width, (block + 1) * width)
            values, vectors = np.linalg.eigh(gradient[part, part])
            order = np.argsort(-values)
            for rank in range(1, width + 1):
                basis = vectors[:, order[:rank]]
                energy = values[order[:rank]].sum() / values.sum()
                assert found.cumulative[block, rank - 1] == pytest.approx(energy, abs=1e-9)
                share = np.trace(basis.T @ activation[part, part] @ basis) / np.trace(activation[part, part])
                # single vectors of nearly equal eigenvalues may turn within their plane
                gap = values[order[rank - 1]] - (values[order[rank]] if rank < width else 0)
                if gap > 1e-6 * values.max():
                    assert kept[block, rank - 1] == pytest.approx(share, abs=1e-6)


def test_energy_held_of_another_gram_matrix_against_plain_projectors():
    one, two = directions_of(random_gram(0)), directions_of(random_gram(1))
    held = one.held(two.gradient)[0]
    for rank in range(1, 7):
        projector = one.vectors[0, :, :rank] @ one.vectors[0, :, :rank].T
        assert held[rank - 1] == pytest.approx(
            float((projector @ two.gradient[0]).trace() / two.gradient[0].trace()), abs=1e-12
        )
    assert held[-1] == pytest.approx(1)
    assert not torch.allclose(held, two.held(one.gradient)[0], atol=1e-3)  # whose directions hold whose energy


def test_a_subspace_holds_its_own_energy_and_nothing_of_an_orthogonal_one():
    first, second = torch.diag(torch.tensor([4.0, 1, 0, 0])), torch.diag(torch.tensor([0.0, 0, 3, 2]))
    one, two = directions_of(first.double()[None]), directions_of(second.double()[None])
    assert one.held(one.gradient)[0].tolist() == pytest.approx([0.8, 1, 1, 1])
    assert one.held(two.gradient)[0, :2].tolist() == pytest.approx([0, 0])
    assert cosine_by_rank(one.vectors, two.vectors)[0, 1] == pytest.approx(0)
    assert cosine_by_rank(one.vectors, one.vectors)[0].tolist() == pytest.approx([1, 1, 1, 1])


def test_thirty_degrees_are_thirty_degrees():
    angle = math.radians(30)
    along = SiteDirections(torch.tensor([[[1.0], [0.0]]], dtype=torch.float64))
    turned = SiteDirections(torch.tensor([[[math.cos(angle)], [math.sin(angle)]]], dtype=torch.float64))
    assert cosine_by_rank(along.vectors, turned.vectors)[0, 0] == pytest.approx(0.75)


def test_random_directions_overlap_by_rank_over_width():
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(60, 2, 1, 24, 24, generator=generator, dtype=torch.float64)
    mean = torch.stack([cosine_by_rank(a, b)[0] for a, b in torch.linalg.qr(drawn).Q]).mean(0)
    assert torch.allclose(mean, torch.arange(1, 25).double() / 24, atol=0.02)


def test_split_half_is_the_mean_of_both_ways(moments):
    site = moments.sites[0]
    even, odd = moments.halves()
    both = []
    for one, two in ((even, odd), (odd, even)):
        gram = two.gradient[site].sum(0).numpy()
        values, vectors = np.linalg.eigh(one.gradient[site].sum(0).numpy())
        basis = vectors[:, np.argsort(-values)[:5]]
        both.append(np.trace(basis.T @ gram @ basis) / np.trace(gram))
    found = split_half(moments, site, per_head=False)
    assert found[0, 4] == pytest.approx(np.mean(both), abs=1e-9)
    assert split_half(moments.shards([0]), site, per_head=False) is None
    assert float(found[0, 4]) < float(SiteDirections.of(moments, site, False).cumulative[0, 4])  # no optimism


def test_the_band_is_the_delete_half_jackknife_over_filled_shards(moments):
    site, filled = moments.sites[0], [i for i in range(moments.n_shards) if int(moments.n_examples[i])]
    assert 3 <= len(filled) < moments.n_shards  # six examples in eight shards

    def share(shards, rank=3):
        values = np.linalg.eigvalsh(sum(moments.gradient[site][i].numpy() for i in shards))[::-1]
        return values[:rank].sum() / values.sum()

    k = len(filled)
    halves = np.array([share(half) for half in itertools.combinations(filled, k // 2)])
    error = math.sqrt(halves.var() * (k // 2) / (k - k // 2))
    low, high = jackknife_band(moments, site, per_head=False)
    reach = stats.t.ppf(0.975, k - 1) * error
    assert low[0, 2] == pytest.approx(max(share(filled) - reach, 0), abs=1e-9)
    assert high[0, 2] == pytest.approx(min(share(filled) + reach, 1), abs=1e-9)
    assert jackknife_band(moments.shards(filled[:2]), site, per_head=False) is None


def test_a_block_without_energy_has_shares_of_zero():
    nothing = torch.zeros(1, 4, 4, dtype=torch.float64)
    assert shares(energies_of(nothing)).tolist() == [[0, 0, 0, 0]]
    assert directions_of(random_gram(0, 4)).held(nothing).tolist() == [[0, 0, 0, 0]]


def test_grids_hold_every_rank_up_to_256_and_the_telling_ones_beyond():
    assert rank_grid(64) == list(range(1, 65))
    wide = rank_grid(2048)
    assert wide[:64] == list(range(1, 65)) and {512, 1024, 2048} <= set(wide) and len(wide) < 270
    assert wide == sorted(set(wide))
    assert on_grid(torch.arange(1, 2049), 2048)[-1] == 2048
    assert on_grid(torch.arange(1, 5), 8) == [1, 2, 3, 4]  # a subspace of four directions


def test_overlaps_of_the_document_are_those_of_the_measures(moments):
    even, odd = moments.halves()
    site = str(moments.sites[0])
    document = from_sources([Source("even", even), Source("odd", odd)])
    one, two = (SiteDirections.of(half, Site.parse(site), True) for half in (even, odd))
    table = document["overlap"][site]["1"]
    assert table["energy"][0][1] == pytest.approx(one.held(two.gradient)[1].tolist(), abs=1e-4)
    assert table["energy"][1][0] == pytest.approx(two.held(one.gradient)[1].tolist(), abs=1e-4)
    assert table["cosine"][0][1] == pytest.approx(cosine_by_rank(one.vectors, two.vectors)[1].tolist(), abs=1e-4)
    assert table["energy"][0][0] is None
    block = document["runs"][0]["blocks"][site]["1"]
    assert sum(block["spectrum"]) == pytest.approx(1, abs=1e-3)
    assert block["total"] == pytest.approx(float(one.gradient[1].trace()), rel=1e-4)
