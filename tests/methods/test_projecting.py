"""SPD's subspace and each control's differ from one another in the one thing that they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spd_lens import methods
from spd_lens.runs.experiment import Experiment
from spd_lens.subspaces.controls import shuffled_answers
from spd_lens.subspaces.moments import GradientMoments
from tests.helpers import reference_rows, refused, relative_error, sine


def subspace(name, experiment):
    return methods.get(name).projection(experiment).subspace


def again_with(experiment, path=None, pair=None, **settings):
    """Another experiment, with nothing in memory, in the same folder or another one."""
    config = experiment.config.model_copy(update=settings)
    where = {"pair": pair or experiment.pair, "tasks": experiment.tasks, "shared": True}
    return Experiment(config, path or experiment.path, **where)


def top_right_singular_vectors(rows, heads, rank):
    """Plain SVD of the stacked rows, head by head."""
    parts = rows.double().unflatten(-1, (heads, -1)).unbind(dim=1)
    return [torch.linalg.svd(part, full_matrices=False).Vh[:rank].T for part in parts]


@pytest.fixture(params=["llama", "qwen2"])
def both(request, tiny_pair, tiny_qwen2_pair, experiment_of):
    return experiment_of(tiny_pair if request.param == "llama" else tiny_qwen2_pair)


@pytest.mark.parametrize("name", ["base", "psr", "ssd", "ssd-config"])
def test_methods_without_a_projection(experiment, name):
    assert methods.get(name).projection(experiment) is None


def test_spd_is_the_svd_of_the_stacked_gradients(both):
    pair, sites = both.pair, both.pair.sites("last_mid")
    encoded = [pair.encode(example) for example in both.calibration]
    gradients, _, _ = reference_rows(pair.hf, encoded, sites)
    found = methods.get("spd").projection(both)
    assert found.strength == 1.0 and found.subspace.sites == sites
    for site in sites:
        right = top_right_singular_vectors(gradients[site], 2, 4)
        for basis, wanted in zip(found.subspace.bases[site], right, strict=True):
            assert sine(basis, wanted) < 1e-3


def test_spd_takes_rank_blocks_centring_and_strength_from_the_config(tiny_pair, experiment_of):
    joint = experiment_of(tiny_pair, rank=3, per_head=False, center=True, strength=0.25)
    found = methods.get("spd").projection(joint)
    site = found.subspace.sites[0]
    assert found.strength == 0.25
    assert found.subspace.bases[site].shape == (1, 16, 3)
    assert torch.equal(found.subspace.offset[site], joint.moments().mean(site, per_head=False))


def test_full_loss_scores_every_token_of_the_completion(both):
    pair, sites = both.pair, both.pair.sites("last_mid")
    encoded = [pair.encode(example) for example in both.calibration]
    moments = both.moments(loss="full")
    assert int(moments.n_scored.sum()) == sum(len(e.ids) - e.completion_start for e in encoded)
    assert int(both.moments().n_scored.sum()) < int(moments.n_scored.sum()) / 2
    everything = [replace(e, scored=list(range(e.completion_start, len(e.ids)))) for e in encoded]
    gradients, _, _ = reference_rows(pair.hf, everything, sites)
    found = subspace("spd-full-loss", both)
    for site in sites:
        assert relative_error(moments.blocks(site, False)[0], gradients[site].T @ gradients[site]) < 1e-4
        for basis, wanted in zip(found.bases[site], top_right_singular_vectors(gradients[site], 2, 4), strict=True):
            assert sine(basis, wanted) < 1e-3
        assert min(map(sine, found.bases[site], subspace("spd", both).bases[site])) > 0.1


def test_activation_pca_is_the_svd_of_the_activations(both):
    sites = both.pair.sites("last_mid")
    _, activations, _ = reference_rows(both.pair.hf, [both.pair.encode(e) for e in both.calibration], sites)
    found = subspace("spd-activation-pca", both)
    for site in sites:
        assert found.ranks[site] == (4, 4)
        for basis, wanted in zip(found.bases[site], top_right_singular_vectors(activations[site], 2, 4), strict=True):
            assert sine(basis, wanted) < 1e-3
        assert min(map(sine, found.bases[site], subspace("spd", both).bases[site])) > 0.1


def test_shuffled_answers_are_other_answers_and_give_another_subspace(experiment, experiment_of):
    moved = shuffled_answers(experiment.calibration, experiment.config.seed)
    for before, after in zip(experiment.calibration, moved, strict=True):
        assert before.prompt == after.prompt
        (start, end), (low, high) = before.spans[0], after.spans[0]
        assert before.completion[start:end] != after.completion[low:high]
        assert before.completion[:start] == after.completion[:low]
    texts = lambda examples: sorted(e.completion[slice(*e.spans[0])] for e in examples)  # noqa: E731 (read twice)
    assert texts(moved) == texts(experiment.calibration)
    found, aligned = subspace("spd-shuffled", experiment), subspace("spd", experiment)
    gradients, _, _ = reference_rows(experiment.pair.hf, [experiment.pair.encode(e) for e in moved], found.sites)
    for site in found.sites:
        wanted = top_right_singular_vectors(gradients[site], 2, 4)
        assert max(map(sine, found.bases[site], wanted)) < 1e-3
        assert max(map(sine, found.bases[site], aligned.bases[site])) > 0.1
    other = subspace("spd-shuffled", experiment_of(experiment.pair, seed=7))
    assert any(max(map(sine, found.bases[site], other.bases[site])) > 0.1 for site in found.sites)


def test_projection_and_complement_add_up_to_the_identity(both):
    kept, left = subspace("spd", both), subspace("spd-complement", both)
    x = torch.randn(3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for site in kept.sites:
        assert torch.allclose(kept(x, site) + left(x, site), x, atol=1e-12)
        assert not torch.allclose(kept(x, site), x, atol=0.1) and not torch.allclose(left(x, site), x, atol=0.1)
        assert torch.allclose(left(kept(x, site), site), torch.zeros_like(x), atol=1e-12)


@pytest.mark.parametrize("kind", ["k", "v"])
def test_one_kind_alone_leaves_the_other_untouched(both, kind):
    found, whole = subspace(f"spd-{kind}-only", both), subspace("spd", both)
    assert found.sites == both.pair.sites("last_mid", kind)
    for site in found.sites:
        assert torch.equal(found.bases[site], whole.bases[site])


def test_one_kind_that_is_not_there_is_refused(tiny_pair, experiment_of):
    keys = experiment_of(tiny_pair, kinds=["k"])
    assert subspace("spd-k-only", keys).sites == keys.pair.sites("last_mid", "k")
    with refused("spd-v-only", "kinds = k"):
        subspace("spd-v-only", keys)


def test_extractions_are_made_once_and_shared(experiment, monkeypatch, tmp_path):
    own = again_with(experiment, path=tmp_path)
    first = own.moments()
    assert [path.name for path in tmp_path.iterdir()] == ["moments-aligned.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr("spd_lens.runs.experiment.extract", None)  # a second extraction would fail
        for seed in (1, 2):
            again = again_with(own, seed=seed).moments()
            assert all(torch.equal(first.gradient[site], again.gradient[site]) for site in first.sites)
    own.moments(loss="full")
    own.moments(shuffled=True)
    names = {"moments-aligned", "moments-full", f"moments-aligned-shuffled-{own.config.seed}"}
    assert {path.stem for path in tmp_path.iterdir()} == names
    for path in tmp_path.iterdir():
        assert int(GradientMoments.load(path).n_examples.sum()) == 12


def test_a_folder_of_another_extraction_is_refused(experiment, tiny_qwen2_pair):
    experiment.moments()
    for change in ({"layers": [1]}, {"kinds": ["k"]}, {"n_calibration": 6}):
        with refused(experiment.path, "another folder"):
            again_with(experiment, **change).moments()
    with refused(experiment.path, "another model"):
        again_with(experiment, pair=tiny_qwen2_pair).moments()
