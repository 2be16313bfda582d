"""The matrix products that no implementation does without, at the rate at which this machine multiplies them now.

All functions take a model pair in the dtype and on the device in question, and a length in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

import spd_lens as spd
from benchmarks import machine

TOKENS_AT_ONCE = 1024
"""Rows of a product over many tokens."""


def extraction_products(pair: spd.ModelPair, layers: str = "last_mid") -> machine.Products:
    """The products of `TOKENS_AT_ONCE` tokens.

    Forward through all linear layers, and the gradient of activations through the layers above the first target.
    """
    first = _first_target(pair, layers)
    inputs = _noise(pair, TOKENS_AT_ONCE)
    products: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer, block in enumerate(pair.hf.model.layers):
        for linear in _linears(block):
            products.append((inputs[linear.in_features], linear.weight.T))
            if layer > first:
                products.append((inputs[linear.out_features], linear.weight))
    return products


def attention_factor(pair: spd.ModelPair, lengths: Sequence[int], layers: str = "last_mid") -> float:
    """The factor by which the products inside attention add to an extraction's, if they ran at the same rate.

    Two products over what a causal mask leaves, half of all pairs; four for the gradient.
    """
    passes = pair.n_layers + 2 * (pair.n_layers - 1 - _first_target(pair, layers))
    shape = pair.fingerprint
    inside = passes * sum(n * n for n in lengths) * shape.n_heads * shape.d_head
    linear = sum(left.shape[1] * right.shape[1] for left, right in extraction_products(pair, layers)) * sum(lengths)
    return 1 + inside / linear


def extraction_seconds(pair: spd.ModelPair, lengths: Sequence[int], layers: str = "last_mid") -> float:
    """Seconds for texts of these lengths."""
    each = machine.matrix_seconds(extraction_products(pair, layers)) / TOKENS_AT_ONCE
    return each * sum(lengths) * attention_factor(pair, lengths, layers)


def generation_seconds(pair: spd.ModelPair, n_rows: int, n_read: int, n_new: int) -> float:
    """Seconds to read prompts of `n_read` tokens together, and for `n_new` steps of `n_rows` rows each."""
    head = pair.hf.get_output_embeddings()

    def products(n: int, linears: Sequence[nn.Linear]) -> machine.Products:
        inputs = _noise(pair, n)
        return [(inputs[linear.in_features], linear.weight.T) for linear in linears]

    blocks = [linear for linear in _linears(pair.hf) if linear is not head]
    reading = machine.matrix_seconds(products(TOKENS_AT_ONCE, blocks)) / TOKENS_AT_ONCE
    return reading * n_read + n_new * machine.matrix_seconds(products(n_rows, _linears(pair.hf)))


def training_seconds(pair: spd.ModelPair, n_tokens: int) -> float:
    """Seconds for so many tokens: forward through all linear layers, and the gradient of activations through all of
    them, since weights are frozen."""
    inputs = _noise(pair, TOKENS_AT_ONCE)
    products = []
    for linear in _linears(pair.hf):
        for width, weight in ((linear.in_features, linear.weight.T), (linear.out_features, linear.weight)):
            products.append((inputs[width], weight.detach()))
    return machine.matrix_seconds(products) / TOKENS_AT_ONCE * n_tokens


def _first_target(pair: spd.ModelPair, layers: str) -> int:
    return min(site.layer for site in pair.sites(layers))


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [found for found in module.modules() if isinstance(found, nn.Linear)]


def _noise(pair: spd.ModelPair, n: int) -> dict[int, torch.Tensor]:
    """A left factor of `n` rows for each width that a linear layer reads or writes."""
    widths = {width for linear in _linears(pair.hf) for width in (linear.in_features, linear.out_features)}
    return {width: torch.randn(n, width, dtype=pair.dtype, device=pair.device) for width in sorted(widths)}
