"""Each estimator finds what was planted in gradients and activations, and what a plain computation in float64 finds."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from spd_lens import estimators
from spd_lens.estimators import Shape
from spd_lens.sites import Site
from spd_lens.subspaces import GradientMoments
from spd_lens.subspaces.positions import CLASSES
from tests.helpers import refused, sine

SITE = Site(3, "v")
HEADS, WIDTH, N = 2, 8, 24
ONE = Shape(rank=1)
WAYS = ["contrast", "attribution", "attribution-contrast", "whitened"]
"""Those whose directions are no singular vectors."""


class Planted:
    """A source of gradients and activations that are known: `rows(shuffled, labels)` gives `g, x`, `[token, width]`."""

    def __init__(self, pair, rows, positions=None, dtype="float32"):
        self.pair, self.rows, self.positions, self.dtype = pair, rows, positions or {}, dtype
        self.calibration, self.seed = [], 5

    def gradients(self, *, keep=(), sinks="first", labels="gold", shuffled=False):
        settings = {"loss": "aligned", "dtype": self.dtype}
        moments = GradientMoments.empty(self.pair.fingerprint, [SITE], 2, settings, keep)
        g, x = self.rows(shuffled=shuffled, labels=labels)
        positions = {name: self.positions.get(name, []) for name in CLASSES}
        for shard in range(2):
            moments.add_tokens(SITE, shard, g, x, positions)
            moments.count(shard, 1.0, len(g), [0], positions)
        return moments


def noise(seed, n=N, scale=1.0):
    return scale * torch.randn(n, HEADS * WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def along(*axes):
    """One row per axis: a unit in that direction of every head."""
    return torch.eye(WIDTH, dtype=torch.float64)[list(axes)].repeat(1, HEADS)


def found(name, source, shape=ONE):
    return estimators.get(name).subspace(source, shape)


def assert_axis(subspace, axis, tolerance=1e-6):
    for block in subspace.blocks(SITE):
        assert sine(block, torch.eye(WIDTH, dtype=torch.float64)[:, [axis]]) < tolerance


def heads(rows):
    """`[head, token, width]`, for plain computations."""
    return rows.unflatten(-1, (HEADS, WIDTH)).movedim(1, 0).numpy()


def assert_spans(subspace, bases):
    for block, wanted in zip(subspace.blocks(SITE), bases, strict=True):
        assert block.shape == wanted.shape
        np.testing.assert_allclose((block @ block.T).numpy(), wanted @ np.linalg.pinv(wanted), atol=1e-7)
        np.testing.assert_allclose((block.T @ block).numpy(), np.eye(block.shape[1]), atol=1e-12)


@pytest.fixture
def noisy(tiny_pair):
    """Every combination of answers has gradients of its own; the activations are not centred, nor alike in size."""
    scales = torch.logspace(-1, 1, WIDTH, dtype=torch.float64).repeat(HEADS)

    def rows(shuffled, labels):
        x = noise(9) * scales + 2.0
        return noise(1 + shuffled) + 0.2 * x * noise(7).sign() * (1 + shuffled), x

    return Planted(tiny_pair, rows)


def test_regions_see_their_own_positions_alone(tiny_pair):
    g = torch.cat([9 * along(0), 2 * along(1, 1), 1.5 * along(2, 2), along(3)])
    positions = {"sink": [0], "prompt": [1, 2], "completion": [3, 4], "scored": [5]}
    source = Planted(tiny_pair, lambda **_: (g, noise(0, 6)), positions)
    for name, axis in {"paper": 0, "no-sink": 1, "prompt": 1, "completion": 2, "scored": 3}.items():
        assert_axis(found(name, source), axis)
    every = found("no-sink", source, Shape(energy=1.0))
    assert every.ranks[SITE] == (3, 3) and every.origin["energy"] == 1.0
    np.testing.assert_allclose(every.singular_values[SITE][0, :4], [4.0, 3.0, 2**0.5, 0.0])  # two shards


def test_fisher_reads_the_gradients_towards_the_models_own_labels(tiny_pair):
    source = Planted(
        tiny_pair, lambda shuffled, labels: (along(*{"gold": [1, 1], "sampled": [4, 4]}[labels]), noise(0, 2))
    )
    assert_axis(found("paper", source), 1)
    assert_axis(found("fisher", source), 4)


def test_contrast_finds_what_right_answers_have_a_larger_share_of(tiny_pair):
    # towards wrong answers every gradient is larger: the plain difference would keep what grew least, direction 2
    right = torch.cat([5 * along(0), 2 * along(1), along(2)])
    wrong = torch.cat([50 * along(0), 10 * along(1), 2 * along(2)])
    source = Planted(tiny_pair, lambda shuffled, **_: (wrong if shuffled else right, noise(0, 3)))
    assert_axis(found("paper", source), 0)
    assert_axis(found("contrast", source), 1)


@pytest.mark.parametrize("rank", [2, 7])
def test_contrast_is_the_top_of_the_difference_of_unit_traces(noisy, rank):
    right, wrong = (heads(noisy.rows(shuffled=shuffled, labels="gold")[0]) for shuffled in (False, True))
    wanted = []
    for g, w in zip(right, wrong, strict=True):
        difference = g.T @ g / np.trace(g.T @ g) - w.T @ w / np.trace(w.T @ w)
        wanted.append(np.linalg.eigh(difference)[1][:, ::-1][:, :rank])
    assert_spans(found("contrast", noisy, Shape(rank=rank)), wanted)


def plain_attribution(g, x):
    """`Σ (gᵀx + xᵀg) / 2`, token by token."""
    return sum((np.outer(a, b) + np.outer(b, a)) / 2 for a, b in zip(g, x, strict=True))


def test_attribution_removes_what_harms(tiny_pair):
    x, g = torch.linalg.qr(noise(1)).Q, 1e-3 * noise(2)
    g[:, [6, WIDTH + 6]] += x[:, [6, WIDTH + 6]]  # the loss falls where this activation shrinks
    g[:, [2, WIDTH + 2]] -= x[:, [2, WIDTH + 2]]  # and this one should grow: as much gradient, in the other direction
    source = Planted(tiny_pair, lambda **_: (g, x))
    kept = found("attribution", source, Shape(rank=WIDTH - 1))
    assert_axis(~kept, 6, tolerance=0.01)
    assert_axis(found("attribution", source), 2, tolerance=0.01)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("name", ["attribution", "attribution-contrast"])
def test_attribution_is_the_bottom_of_gradient_times_activation(noisy, name, center):
    rows = [[heads(part) for part in noisy.rows(shuffled=shuffled, labels="gold")] for shuffled in (False, True)]
    wanted, right = [], rows[0][1]
    for head in range(HEADS):
        gains, mean = [], right[head].mean(axis=0)  # the mean that the projection leaves in place, for both
        for g, x in rows:
            gains.append(plain_attribution(g[head], x[head] - center * mean))
        gain = gains[0] - gains[1] if name == "attribution-contrast" else gains[0]
        wanted.append(np.linalg.eigh(gain)[1][:, :5])
    subspace = found(name, noisy, Shape(rank=5, center=center))
    assert_spans(subspace, wanted)
    assert set(subspace.offset) == ({SITE} if center else set())


def test_whitened_divides_by_what_the_activations_do_anyway(tiny_pair):
    x = noise(3, 400)
    x[:, [1, WIDTH + 1]] *= 30  # much activation, and therefore much gradient
    g = torch.cat([10 * along(1), 4 * along(5), *[along(0)] * 398])
    source = Planted(tiny_pair, lambda **_: (g / torch.tensor([1.0] * 2 + [398**0.5] * 398)[:, None], x))
    assert_axis(found("paper", source), 1)
    assert_axis(found("whitened", source), 5, tolerance=0.3)


@pytest.mark.parametrize("center", [False, True])
def test_whitened_spans_the_generalised_eigenvectors(noisy, center):
    g, x = (heads(part) for part in noisy.rows(shuffled=False, labels="gold"))
    wanted = []
    for head in range(HEADS):
        own = x[head] - center * x[head].mean(axis=0)
        energy = 2 * own.T @ own  # two shards
        ridge = 1e-3 * np.trace(energy) / WIDTH
        _, vectors = scipy.linalg.eigh(2 * g[head].T @ g[head], energy + ridge * np.eye(WIDTH))
        wanted.append(vectors[:, ::-1][:, :3])
    subspace = found("whitened", noisy, Shape(rank=3, center=center))
    assert_spans(subspace, wanted)
    assert_spans(subspace[:2], [vectors[:, :2] for vectors in wanted])
    assert subspace.origin["ridge"] == 1e-3


def test_whitened_is_not_moved_by_what_rounding_left(tiny_pair):
    """Few gradient directions, and activations that hardly use some of the others."""
    g = noise(4, 40)
    g[:, [c + head * WIDTH for head in range(HEADS) for c in range(3, WIDTH)]] = 0
    turn = torch.linalg.qr(noise(5, WIDTH)[:, :WIDTH]).Q
    g = torch.cat([part @ turn for part in g.split(WIDTH, dim=1)], dim=1)
    x = noise(6, 400)[:40] * torch.logspace(0, -3, WIDTH, dtype=torch.float64).repeat(HEADS)
    exact = found("whitened", Planted(tiny_pair, lambda **_: (g, x)), Shape(rank=3))
    rounded = Planted(tiny_pair, lambda **_: (g.bfloat16().double(), x), dtype="bfloat16")
    for one, other in zip(exact.blocks(SITE), found("whitened", rounded, Shape(rank=3)).blocks(SITE), strict=True):
        assert sine(one, other) < 0.05


def test_a_region_projects_around_the_mean_of_all_tokens(noisy):
    source = Planted(noisy.pair, noisy.rows, {"scored": [0, 1, 2], "prompt": list(range(3, N))})
    whole = source.gradients(keep=("classes",))
    subspace = found("scored", source, Shape(rank=2, center=True))
    assert torch.equal(subspace.offset[SITE], whole.mean(SITE))
    assert not torch.allclose(whole.region("scored").mean(SITE), whole.mean(SITE))


@pytest.mark.parametrize("name", WAYS)
def test_what_all_of_them_record_and_refuse(noisy, name):
    subspace = found(name, noisy, Shape(rank=0.5, per_head=False))
    assert subspace.ranks[SITE] == (8,) and subspace.rank == 0.5 and not subspace.singular_values
    assert subspace.origin["estimator"] == name and subspace.origin["n_examples"] == 2
    assert subspace.fingerprint == noisy.pair.fingerprint
    with refused(f"estimator {name!r} takes no energy", "give a rank"):
        found(name, noisy, Shape(energy=0.9))
    with refused(f"estimator {name!r} takes no center_gradients", "leave it out"):
        found(name, noisy, Shape(center_gradients=True))
    with refused("rank 9", "width of 8"):
        found(name, noisy, Shape(rank=9))


@pytest.mark.parametrize(("name", "known"), zip(WAYS, [2, 3, 3, 2], strict=True))
def test_a_rank_is_capped_where_fewer_directions_are_known(tiny_pair, name, known):
    # two tokens: two directions of gradients, and one more that only activations have
    g, x = along(0, 1), along(0, 3) + along(1, 1)
    source = Planted(tiny_pair, lambda **_: (g, x))
    assert found(name, source, Shape(rank=6)).ranks[SITE] == (known, known)


@pytest.mark.parametrize("name", WAYS)
def test_without_any_gradient_there_is_nothing_to_find(tiny_pair, name):
    source = Planted(tiny_pair, lambda **_: (torch.zeros_like(noise(0)), noise(0)))
    with refused("gradients at site 3.v are all zero"):
        found(name, source)
