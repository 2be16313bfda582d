from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from spd_lens.errors import SPDError
from spd_lens.generation.sampling import Sampling, choose, truncated
from spd_lens.models.drawing import draw, row_uniforms


class Sampler:
    """Tokens of a batch of completions `(prompt id, sample number)`, step by step."""

    def __init__(self, sampling: Sampling, rows: list[tuple[str, int]], seed: int, n_steps: int) -> None:
        self.sampling = sampling
        self.noise = torch.from_numpy(np.stack([row_uniforms(seed, *row, n_steps) for row in rows]))

    def choose(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        return choose(logits, self.sampling, self.noise[:, step], [step] * len(logits))


def distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """`truncated` spread over the whole vocabulary."""
    ids, weights = truncated(logits, sampling)
    assert (ids.diff(dim=-1) > 0).all()
    spread = torch.zeros(logits.shape, dtype=torch.float64).scatter(-1, ids, weights.double())
    return spread / spread.sum(dim=-1, keepdim=True)


def warped(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The same by transformers' warpers, in its order, in float64 as ours is."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits.double())
    if sampling.top_k is not None:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.softmax(dim=-1)


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])  # flat (thousands of tokens are kept), middling, peaked
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 50])
def test_truncation_is_that_of_transformers(spread: float, top_p: float, top_k: int | None) -> None:
    logits = spread * torch.randn(6, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampling = Sampling(0.7, top_p, top_k)
    ours, theirs = distribution(logits, sampling), warped(logits, sampling)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    torch.testing.assert_close(distribution(logits.float(), sampling), theirs, rtol=1e-5, atol=0)


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 1.0, 1.0, 0.0]])
    assert (distribution(logits, Sampling(1.0, 1.0, top_k=3)) > 0).tolist() == [[True] * 5 + [False]]
    probabilities = logits[0].softmax(0)
    reached_by_one_of_the_three = float(probabilities[0] + probabilities[2] + probabilities[1] / 2)
    kept = distribution(logits, Sampling(1.0, reached_by_one_of_the_three)) > 0
    assert kept.tolist() == [[True] * 5 + [False]]


def test_a_tie_across_the_first_candidates_is_kept_whole() -> None:
    logits = torch.zeros(1, 1000)  # the 128 candidates looked at first all tie with those that follow
    assert (distribution(logits, Sampling(1.0, 0.1)) > 0).all()
    assert (distribution(logits, Sampling(1.0, 0.1, top_k=3)) > 0).all()


def test_a_minute_temperature_is_greedy() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(Sampling(1e-30), [(str(i), 0) for i in range(4)], 0, 1)
    assert torch.equal(sampler.choose(logits, 0), logits.argmax(-1))


def test_tokens_without_probability_are_never_drawn() -> None:
    logits = torch.full((200, 50), -torch.inf)
    logits[:, [3, 40]] = 0.0
    sampler = Sampler(Sampling(1.0, 1.0), [(str(i), 0) for i in range(200)], 0, 1)
    assert set(sampler.choose(logits, 0).tolist()) == {3, 40}


@pytest.mark.parametrize("sampling", [Sampling(0.7, 0.9), Sampling(1.3, 1.0), Sampling(1.0, 0.95, top_k=5)])
def test_frequencies_match_the_truncated_softmax(sampling: Sampling) -> None:
    n_rows, n_steps = 500, 40
    n = n_rows * n_steps
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    sampler = Sampler(sampling, [(str(row), 0) for row in range(n_rows)], seed=1, n_steps=n_steps)
    drawn = torch.cat([sampler.choose(logits.expand(n_rows, -1), step) for step in range(n_steps)])
    expected = warped(logits, sampling)[0].numpy()
    observed = np.bincount(drawn.numpy(), minlength=40)
    assert observed[expected == 0].sum() == 0
    kept = expected > 0
    assert chisquare(observed[kept], n * expected[kept]).pvalue > 1e-3


def test_draw_inverts_the_cumulative_distribution() -> None:
    ids = torch.tensor([[2, 5, 7, 9]]).expand(5, -1)
    weights = torch.tensor([[0.0, 0.25, 0.5, 0.0]]).expand(5, -1)  # sums to 0.75, ends with a zero
    uniforms = torch.tensor([0.0, 0.33, 0.34, 0.999, 1 - 2**-53], dtype=torch.float64)
    assert draw(ids, weights, uniforms).tolist() == [5, 5, 7, 7, 7]
    assert draw(ids[:1], weights[:1], torch.tensor([1.0], dtype=torch.float64)).tolist() == [7]


def test_noise_belongs_to_seed_prompt_and_sample() -> None:
    row = row_uniforms(42, "a", 0, 50)
    assert np.array_equal(row[:10], row_uniforms(42, "a", 0, 10))
    for other in [row_uniforms(43, "a", 0, 50), row_uniforms(42, "b", 0, 50), row_uniforms(42, "a", 1, 50)]:
        assert np.abs(row - other).min() > 0
    assert row.min() >= 0 and row.max() < 1
    # pinned: a corpus must be the same with every version of numpy and on every platform
    np.testing.assert_array_equal(
        row_uniforms(42, "gsm8k-train-7", 0, 3), [0.8599167229049579, 0.8857807019000133, 0.8564168891133791]
    )


def test_noise_is_uniform_and_independent_between_rows() -> None:
    rows = np.stack([row_uniforms(0, str(i), 0, 200) for i in range(200)])
    assert abs(rows.mean() - 0.5) < 0.005 and abs(rows.var() - 1 / 12) < 0.002
    correlations = np.corrcoef(rows)[np.triu_indices(200, 1)]
    assert abs(correlations.mean()) < 0.005 and abs(correlations.std() - 1 / math.sqrt(200)) < 0.01


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = 2 * torch.randn(8, 300, generator=torch.Generator().manual_seed(5))
    rows = [(f"p{i}", i % 2) for i in range(8)]
    sampling = Sampling(1.0, 0.9)
    together = Sampler(sampling, rows, 7, 20)
    for i in (0, 3, 7):
        alone = Sampler(sampling, [rows[i]], 7, 5)
        for step in range(5):
            assert together.choose(logits, step)[i] == alone.choose(logits[i : i + 1], step)[0]


def test_greedy_is_the_argmax() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sampler(Sampling(0.0), [("a", 0)] * 4, 0, 1).choose(logits, 0), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(temperature: float, bad: float) -> None:
    logits = torch.zeros(2, 10)
    logits[1, 4] = bad
    with pytest.raises(SPDError, match="not finite at new token 3"):
        Sampler(Sampling(temperature), [("a", 0), ("b", 0)], 0, 4).choose(logits, 2)


@pytest.mark.parametrize(
    "fields",
    [{"temperature": -0.1}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": -1}, {"top_k": -1}],
)
def test_parameters_out_of_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(SPDError, match=next(iter(fields))):
        Sampling.resolve(pair_with(), **fields)


def pair_with(**own: float) -> SimpleNamespace:
    config = SimpleNamespace(**({"temperature": None, "top_p": None, "top_k": None} | own))
    return SimpleNamespace(hf=SimpleNamespace(generation_config=config))


def test_defaults_are_the_models_own_else_documented() -> None:
    assert Sampling.resolve(pair_with()) == Sampling(0.7, 0.95, None)
    own = pair_with(temperature=0.6, top_k=20)
    assert Sampling.resolve(own) == Sampling(0.6, 0.95, 20)
    assert Sampling.resolve(own, temperature=1.0, top_p=0.5, top_k=0) == Sampling(1.0, 0.5, None)
    assert Sampling.resolve(own, temperature=0) == Sampling(0.0, 1.0, None)
