"""Sampled labels: drawn from the model's own distribution, whatever the batch; their mean is the Fisher matrix."""

import numpy as np
import pytest
import torch

from spd_lens.models.drawing import drawn_tokens, row_uniforms
from spd_lens.sites import Site
from spd_lens.subspaces.extract import extract
from tests.helpers import EXAMPLES, hook_at, norms_in_full_precision, refused, relative_error

SITE = Site(1, "v")


def taken(pair, examples=EXAMPLES, engine="twin", **options):
    return extract(pair, examples, engine=engine, progress=False, layers=[SITE.layer], kinds=[SITE.kind], **options)


def pass_of(pair, example):
    """`log p` at the scored positions of one example, in float64, and the activation that it depends on."""
    e, kept = pair.encode(example), []
    with norms_in_full_precision():
        handle = hook_at(pair.hf, SITE, lambda activation: kept.append(activation.detach().requires_grad_()) or kept[0])
        logits = pair.hf(torch.tensor([e.ids])).logits[0]
        handle.remove()
    return logits.log_softmax(dim=-1)[[t - 1 for t in e.scored]], kept[0], e


def gram_of(log_p, activation, labels):
    """`gᵀg` of the mean loss towards some labels."""
    loss = -sum(log_p[i, label] for i, label in enumerate(labels)) / len(labels)
    (g,) = torch.autograd.grad(loss, activation, retain_graph=True)
    return (g[0].T @ g[0]).detach()


def test_tokens_are_drawn_by_inverse_cdf_from_the_whole_distribution():
    logits = torch.randn(70, 9, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(70, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = drawn_tokens(logits, uniforms)
    for row, u, token in zip(logits.double(), uniforms.tolist(), found.tolist(), strict=True):
        p = np.exp(row.numpy()) / np.exp(row.numpy()).sum()
        assert p[:token].sum() <= u < p[: token + 1].sum()
    even = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    shares = drawn_tokens(logits[:1].expand(4000, 9), even).bincount(minlength=9) / 4000
    assert torch.allclose(shares, logits[0].softmax(0), atol=1e-3)


@pytest.mark.parametrize("engine", ["twin", "lens"])
def test_labels_are_drawn_from_the_models_own_distribution(pair_of, family, engine):
    """The labels written out by hand, their gradients by plain autograd."""
    pair, seed = pair_of(family, "auto", "float64"), 5
    with norms_in_full_precision():
        moments = taken(pair, engine=engine, labels="sampled", seed=seed, shards=len(EXAMPLES))
    moved = 0
    for shard, example in enumerate(EXAMPLES):
        log_p, activation, e = pass_of(pair, example)
        uniforms = row_uniforms(seed, f"label {e.ids}", 0, len(e.scored))
        cumulative = log_p.detach().exp().cumsum(dim=-1)
        labels = [int((row <= u).sum()) for row, u in zip(cumulative, uniforms, strict=True)]
        moved += labels != [e.ids[t] for t in e.scored]
        assert relative_error(moments.gradient[SITE][shard], gram_of(log_p, activation, labels)) < 1e-4
        loss = -sum(log_p[i, label].item() for i, label in enumerate(labels)) / len(labels)
        assert moments.loss_sum[shard].item() == pytest.approx(loss, rel=1e-6)
    assert moved > len(EXAMPLES) / 2, "the labels are those of the examples"


def test_on_the_mean_over_draws_the_moments_are_the_fisher_matrix(pair_of):
    """All labels enumerated, weighted by their probabilities, against the mean over 100 seeds."""
    pair, example, n = pair_of("qwen2", "auto", "float64"), EXAMPLES[4], 100
    log_p, activation, e = pass_of(pair, example)
    p = log_p.detach().exp()
    fisher, size = 0.0, len(e.scored)
    for i in range(size):  # terms of two positions vanish: each mean score is zero
        rows = []
        for token in range(p.shape[1]):
            (g,) = torch.autograd.grad(-log_p[i, token] / size, activation, retain_graph=True)
            rows.append(g[0])
        rows = torch.stack(rows)
        assert (p[i, :, None, None] * rows).sum(0).norm() < 1e-9 * rows.norm(), "the mean score is not zero"
        fisher = fisher + torch.einsum("v,vti,vtj->ij", p[i], rows, rows)
    with norms_in_full_precision():
        draws = torch.stack(
            [taken(pair, [example], labels="sampled", seed=seed, shards=1).gradient[SITE][0] for seed in range(n)]
        )
        gold = taken(pair, [example], shards=1).gradient[SITE][0]
    error = 3 * (draws - draws.mean(0)).square().sum((1, 2)).mean().sqrt() / n**0.5
    assert (draws.mean(0) - fisher).norm() < error < 0.5 * fisher.norm()
    assert (gold - fisher).norm() > 2 * error, "gold labels would pass, too"


@pytest.mark.parametrize("engine", ["twin", "lens"])
def test_neither_batch_nor_order_nor_neighbours_change_a_label(tiny_pair, engine):
    alone = [taken(tiny_pair, [example], engine, labels="sampled", shards=1) for example in EXAMPLES]
    for examples in (EXAMPLES, EXAMPLES[::-1]):
        for batch_tokens in (1, 10**6):
            moments = taken(
                tiny_pair, examples, engine, labels="sampled", shards=len(examples), batch_tokens=batch_tokens
            )
            for shard, example in enumerate(examples):
                expected = alone[EXAMPLES.index(example)].gradient[SITE][0]
                assert relative_error(moments.gradient[SITE][shard], expected) < 1e-5


def test_a_seed_names_the_draws(tiny_pair):
    one, same, other = (taken(tiny_pair, labels="sampled", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.gradient[SITE], same.gradient[SITE])
    assert relative_error(other.gradient[SITE], one.gradient[SITE]) > 0.1
    assert torch.equal(one.activation[SITE], other.activation[SITE])
    assert torch.equal(one.n_scored, other.n_scored)
    assert torch.equal(taken(tiny_pair, seed=1).gradient[SITE], taken(tiny_pair, seed=2).gradient[SITE])
    assert "seed" not in taken(tiny_pair, seed=1).settings
    with refused("settings", "seed"):
        one + other
