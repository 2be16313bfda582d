"""How the next token is drawn: temperature, top-k and top-p."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spd_lens.errors import SPDError, whole
from spd_lens.models import ModelPair, draw

DEFAULT_TEMPERATURE = 0.7
DEFAULT_TOP_P = 0.95

_FIRST_CANDIDATES = 128  # enough for top-p 0.95 at nearly every step of a language model
_GROWTH = 8


@dataclass(frozen=True)
class Sampling:
    """The distribution that Eq. 13 draws from. The paper does not name it, so every run writes it out."""

    temperature: float = DEFAULT_TEMPERATURE
    """Divides the logits. 0 is greedy: the most probable token, whatever `top_p` and `top_k` say."""
    top_p: float = DEFAULT_TOP_P
    """Smallest set of most probable tokens whose probabilities reach this sum; 1 keeps all."""
    top_k: int | None = None
    """At most this many tokens (more where logits tie), applied before `top_p`; None keeps all."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SPDError(
                f"temperature {self.temperature} is not a number >= 0; 0 is greedy, {DEFAULT_TEMPERATURE} usual"
            )
        if not 0 < self.top_p <= 1:
            raise SPDError(f"top_p {self.top_p} is not in (0, 1]; 1 keeps every token, {DEFAULT_TOP_P} is usual")
        if self.top_k is not None and self.top_k < 1:
            raise SPDError(f"top_k {self.top_k} is not a count >= 1; leave it out (or give 0) to keep every token")

    @classmethod
    def resolve(
        cls,
        pair: ModelPair,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
    ) -> Sampling:
        """What is given; else what the model's own generation config sets; else temperature 0.7, top-p 0.95, no top-k.

        Each of the three is resolved by itself. `top_k=0` means none, also where the model's config sets one. Greedy
        (`temperature=0`) drops the other two, so that settings which cannot matter are not compared on resume.

        Raises:
            SPDError: temperature < 0, top_p outside (0, 1] or top_k < 0.
        """
        own: Any = pair.hf.generation_config
        given = cls(  # checked before greedy forgets the others
            float(_first(temperature, own.temperature, DEFAULT_TEMPERATURE)),
            float(_first(top_p, own.top_p, DEFAULT_TOP_P)),
            whole("top_k", _first(top_k, own.top_k, 0), least=None) or None,
        )
        return cls(0.0, 1.0, None) if given.greedy else given

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def choose(
    logits: Float[Tensor, "row d_vocab"],
    sampling: Sampling,
    uniforms: Float[Tensor, " row"],
    steps: Sequence[int],
    examples: Sequence[str] = (),
) -> Int[Tensor, " row"]:
    """The next token of every row.

    Args:
        logits: Logits of the next token.
        sampling: What to draw from.
        uniforms: Each row's noise at its step, from `models.row_uniforms`.
        steps: Each row's step (0 for the first new token), to name it where something is wrong.
        examples: What a message calls each row's example.

    Raises:
        SPDError: the logits hold NaN, from which nothing can be drawn.
    """
    best, greedy = logits.max(dim=-1)
    require_finite(best, steps, examples)
    if sampling.greedy:
        return greedy
    ids, weights = truncated(logits, sampling)
    return draw(ids, weights, uniforms.to(logits.device))


def require_finite(best: Float[Tensor, " row"], steps: Sequence[int], examples: Sequence[str] = ()) -> None:
    """Raise `SPDError` where nothing can be drawn from a row's logits, of which `best` is the largest."""
    finite = torch.isfinite(best)  # NaN and +inf win every maximum; all -inf leaves -inf
    if not finite.all():
        row = int(finite.int().argmin())
        which = f" for {examples[row]}" if examples else ""
        raise SPDError(
            f"the model's logits are not finite at new token {steps[row] + 1}{which}; load it with "
            "dtype='float32' (float16 overflows in many models) or check its weights"
        )


def truncated(
    logits: Float[Tensor, "row d_vocab"], sampling: Sampling
) -> tuple[Int[Tensor, "row candidate"], Float[Tensor, "row candidate"]]:
    """Candidate tokens in ascending order of id, and their weights (0 outside the truncation, not summing to 1).

    Equal to transformers' temperature, top-k and top-p warpers in this order, except that tokens whose logits tie with
    the last one kept are all kept, so that the outcome cannot depend on how a sort breaks ties. The vocabulary is not
    sorted, which would cost more than a step of a small model: the largest `n` logits are taken, and more only where
    something may have been missed. Float64 is kept for what is accumulated, over the candidates.
    """
    d_vocab = logits.shape[-1]
    top = logits.amax(dim=-1, keepdim=True)
    top_k = d_vocab if sampling.top_k is None else min(sampling.top_k, d_vocab)
    if top_k == d_vocab and sampling.top_p >= 1:
        ids = torch.arange(d_vocab, device=logits.device).expand_as(logits)
        return ids, ((logits - top) / sampling.temperature).exp()
    everything = None  # the sum of all tokens' weights, relative to the most probable token's
    if top_k == d_vocab:
        everything = ((logits - top) / sampling.temperature).exp().sum(dim=-1, keepdim=True).double()
    n = min(max(_FIRST_CANDIDATES, top_k + 1 if top_k < d_vocab else 0), d_vocab)
    while True:
        values, ids = logits.topk(n, dim=-1)
        weights = ((values - top).double() / sampling.temperature).exp()
        if everything is None:
            among_k = values >= values[:, top_k - 1 : top_k]
            weights = weights * among_k
            kept = among_k & _nucleus(weights, weights.sum(dim=-1, keepdim=True), sampling.top_p)
            complete = not among_k[:, -1].any()
        else:
            kept = _nucleus(weights, everything, sampling.top_p)
            complete = not kept[:, -1].any()
        # once every row has cut something off, all ties with the last token kept are among the candidates
        if complete or n == d_vocab:
            break
        n = min(n * _GROWTH, d_vocab)
    ids, order = ids.sort(dim=-1)
    return ids, (weights * kept).gather(-1, order)


def _nucleus(
    weights: Float[Tensor, "row candidate"], total: Float[Tensor, "row 1"], top_p: float
) -> Bool[Tensor, "row candidate"]:
    """Which of the descending weights belong to the smallest set that reaches `top_p` of the total, ties included."""
    before = weights.cumsum(dim=-1) - weights
    inside = before < top_p * total  # the first token always is
    last = weights.masked_fill(~inside, math.inf).amin(dim=-1, keepdim=True)
    return weights >= last
