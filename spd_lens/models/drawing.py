"""Tokens at random, with noise that belongs to a text and not to its batch."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spd_lens.models.losses import ROWS


def row_uniforms(seed: int, prompt_id: str, sample: int, n_steps: int) -> Float[np.ndarray, " step"]:
    """One uniform number in [0, 1) per step for one completion.

    Philox is counter-based: the key is a hash of seed, prompt id and sample number, the counter is the step. A longer
    row begins with the shorter one, and no other row, batch or interruption can shift it. Raw bits are used because
    numpy promises them to stay the same in every version.
    """
    name = json.dumps([seed, prompt_id, sample]).encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    bits = np.random.Philox(key=key).random_raw(n_steps)
    return (bits >> np.uint64(11)) * 2.0**-53  # the upper 53 bits, as a double


def draw(
    ids: Int[Tensor, "row candidate"],
    weights: Float[Tensor, "row candidate"],
    uniforms: Float[Tensor, " row"],
) -> Int[Tensor, " row"]:
    """Inverse of the cumulative distribution over the candidates, which must be in ascending order of token id.

    Weights need not sum to 1. Order by id, not by probability: two nearly equal probabilities may swap between batches,
    ids never do.
    """
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    # u < 1, but u * total may round up to the total: the last candidate with any weight then takes it
    target = uniforms[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return ids.gather(-1, torch.minimum(place, last))[:, 0]


@torch.no_grad()
def drawn_tokens(logits: Float[Tensor, "row d_vocab"], uniforms: Float[Tensor, " row"]) -> Int[Tensor, " row"]:
    """A token of each row's whole distribution `p = softmax(logits)`, by inverse CDF in float64."""
    found = [
        draw(torch.arange(some.shape[-1], device=some.device).expand_as(some), some.double().softmax(dim=-1), own)
        for some, own in zip(logits.split(ROWS), uniforms.to(logits.device).split(ROWS), strict=True)
    ]
    return torch.cat(found)
