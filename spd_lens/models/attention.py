"""The fastest attention of those in transformers, and an attention for the steps of cached decoding on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from spd_lens.models.transformers_private import attention_implementation, call_attention, may_change_attention

_SHORT = 512
"""Tokens up to which attention weights are small beside the other activations."""
_ONE_QUERY = "spd_lens_one_query"
_LARGE = 400_000
"""Elements of a layer's keys (row, KV head, column, d_head) from which on products are faster in float32."""
_FEW_QUERIES = 4
"""Most query heads per KV head with which products are faster in float32."""


@contextlib.contextmanager
def fastest_attention(model: Any, length: int) -> Iterator[None]:
    """While open, attention in bfloat16 on a CPU is plain matrix products, as torch's kernel takes twice as long there.

    They keep all attention weights for the backward pass, so long sequences keep torch's kernel.
    """
    fitting = model.dtype == torch.bfloat16 and model.device.type == "cpu" and length <= _SHORT
    if not fitting or attention_implementation(model.config) != "sdpa" or not may_change_attention(model):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


@contextlib.contextmanager
def one_query_at_a_time(model: Any) -> Iterator[bool]:
    """While open, a pass of one token per row over a cache may take `one_query_attention`; yields whether it may.

    Where it may, masks must be those of eager attention, which are added to the scores. It may on a CPU, in models that
    use sdpa and look up their attention by name.
    """
    config = model.config.get_text_config()
    if attention_implementation(config) != "sdpa" or model.device.type != "cpu" or not may_change_attention(model):
        yield False
        return
    call_attention(config, _ONE_QUERY)  # in every step
    try:
        yield True
    finally:
        call_attention(config, "sdpa")


def one_query_attention(
    module: Any,
    query: Float[Tensor, "row head query d_head"],
    key: Float[Tensor, "row kv_head column d_head"],
    value: Float[Tensor, "row kv_head column d_value"],
    attention_mask: Float[Tensor, "row 1 query column"] | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "row query head d_value"], None]:
    """Attention as transformers calls it: one query over a cache by two batched products, everything else by sdpa.

    PyTorch's kernel is made for many queries: with one, products read keys and values at the speed of memory, in one to
    two thirds of its time in bfloat16 and four fifths in float32. Keys stand on the left of their product, where
    oneDNN is twice as fast as with the query there. Scores are rounded to the model's dtype, as in eager attention, and
    the softmax is in float32.

    In bfloat16, where rounding shows in the tokens, the size of the cache does not decide which way is taken: a row
    computes the same whether few others are beside it or many. A single row is sdpa's, whose products differ anyway.
    """
    n_rows, n_heads, n_queries, d_head = query.shape
    group = n_heads // key.shape[1]
    pays = {
        torch.bfloat16: n_rows > 1,
        torch.float32: key.numel() >= _LARGE and group <= _FEW_QUERIES,
    }.get(query.dtype, False)
    known = attention_mask is not None and attention_mask.is_floating_point() and others.get("position_bias") is None
    if n_queries != 1 or not known or not pays:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    assert attention_mask is not None
    query = query.view(n_rows, key.shape[1], group, d_head)
    scores = torch.matmul(key, query.transpose(2, 3)).transpose(2, 3)
    scores = torch.add(attention_mask, scores, alpha=d_head**-0.5 if scaling is None else scaling)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, value).reshape(n_rows, 1, n_heads, -1), None


AttentionInterface.register(_ONE_QUERY, one_query_attention)
