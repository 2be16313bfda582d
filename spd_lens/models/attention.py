"""The fastest attention of those in transformers, one for the steps of cached decoding, and what attention rests on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from spd_lens.errors import SPDError
from spd_lens.models.hooks import unembed_only
from spd_lens.models.transformers_private import attention_implementation, call_attention, may_change_attention
from spd_lens.models.twin import run_twin
from spd_lens.models.weights import attention_layer

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
    if not (model.dtype == torch.bfloat16 and model.device.type == "cpu" and length <= _SHORT):
        yield
        return
    with _plain_attention(model):
        yield


@contextlib.contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """While open, attention is plain matrix products, which keep their weights, if the model lets that be set."""
    if attention_implementation(model.config) != "sdpa" or not may_change_attention(model):
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


@torch.no_grad()
def attention_received(model: Any, ids: Sequence[int], layers: Sequence[int]) -> Float[Tensor, " pos"]:
    """How much attention each position of a text receives, on the mean over layers, heads, and the queries that can see
    it (Gu et al. 2024, "When attention sink emerges", section 3.1), in float64: between 0 and 1.

    The weights of one layer are in memory at a time.

    Raises:
        SPDError: the architecture's attention does not give its weights.
    """
    found: list[Tensor] = []
    tokens = torch.tensor([list(ids)], device=model.device)

    def keep(module: Any, _args: Any, output: Any) -> Any:
        parts = output if isinstance(output, tuple) else (output,)
        weights = [x for x in parts if isinstance(x, Tensor) and x.ndim == 4 and x.shape[2:] == (len(ids), len(ids))]
        if len(weights) != 1:
            raise SPDError(
                f"{type(module).__name__} does not give its attention weights, so the position that receives most "
                "attention is not known; take sinks='first'"
            )
        received = weights[0][0].sum(dim=1, dtype=torch.float64).mean(dim=0)  # over queries, and over heads
        found.append(received.to(tokens.device))
        return tuple(None if x is weights[0] else x for x in parts)

    first = torch.zeros(1, dtype=torch.long, device=model.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_plain_attention(model))
        stack.enter_context(unembed_only(model.get_output_embeddings(), first, first))
        for layer in sorted(set(layers)):
            stack.callback(attention_layer(model, layer).register_forward_hook(keep).remove)
        run_twin(model, tokens, use_cache=False)
    seen_by = torch.arange(len(ids), 0, -1, device=model.device)
    return (torch.stack(found).mean(dim=0) / seen_by).cpu()


AttentionInterface.register(_ONE_QUERY, one_query_attention)
