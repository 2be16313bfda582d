"""Whether two models agree on long texts: windows and rope regimes begin where short texts have ended."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedModel

from spd_lens.models.architectures import numbers_in
from spd_lens.models.backends import lens_logits
from spd_lens.models.batches import right_pad
from spd_lens.models.devices import free_memory
from spd_lens.models.hooks import unembed_only
from spd_lens.models.parity import CHECK_TEXTS, Parity
from spd_lens.models.tokenizer import text_ids
from spd_lens.models.twin import run_twin

# Settings that name a number of tokens from which on a model computes otherwise: sliding_window, window_size,
# attention_window_size, attention_chunk_size, local_attention, original_max_position_embeddings, floor_scale, ...
_REGIME = re.compile(r"window|chunk_size|local_attention|original_max_position|floor_scale|block_size")
_NO_REGIME = re.compile(r"layer|feed_forward|vision|audio")
_LAST, _SAMPLE = 16, 48
"""Positions of a text whose logits are compared: the last ones, and others at equal distances."""
_ATTENTION_COPIES = 4
"""A lens model keeps scores, masked scores and weights of a layer's attention."""


def regimes(config: Any) -> dict[int, str]:
    """Lengths in tokens beyond which a configuration says that the model computes otherwise, and what they are called.

    They are found by name in the configuration and all that is nested in it; an unneeded one costs one comparison.
    """
    found: dict[int, str] = {}
    for name, value in numbers_in(config.to_dict()):
        if _REGIME.search(name) and not _NO_REGIME.search(name) and value > 0:
            found.setdefault(value, name)
    return dict(sorted(found.items()))


def beyond(length: int, limit: int) -> int:
    """The length of a text that is clearly beyond a regime, and within the context."""
    return min(limit, length + max(length // 4, 16))


def rows_that_fit(twin: PreTrainedModel, length: int) -> int:
    """How many rows of a length fit into memory with a lens model's plain attention: 0, 1 or 2."""
    n_heads = twin.config.get_text_config().num_attention_heads
    each = _ATTENTION_COPIES * n_heads * length**2 * torch.float32.itemsize
    return min(2, int(free_memory(twin.device) / 2 / each))


@torch.no_grad()
def parity_at(twin: PreTrainedModel, lens: Any, tokenizer: Any, length: int) -> Parity:
    """How far the lens model is from the twin on a text of that length in tokens.

    A shorter text stands beside it, padded on the right, where there is memory for two. Logits are made at some
    positions only.
    """
    lengths = [length, max(2, 2 * length // 3)][: max(1, rows_that_fit(twin, length))]
    rows = [long_text(tokenizer, n, seed) for seed, n in enumerate(lengths)]
    tokens, mask = right_pad(rows, rows[0][0], twin.device)  # some row of the embedding: padding is masked
    places = [(row, position) for row, n in enumerate(lengths) for position in _positions(n)]
    row, position = torch.tensor(places, device=twin.device).T
    with unembed_only(twin.get_output_embeddings(), row, position):
        reference = run_twin(twin, tokens, attention_mask=mask, use_cache=False).logits[0].cpu().double()
    with unembed_only(lens.unembed, row, position):
        found = lens_logits(lens, tokens, mask)[0].cpu().double()
    return Parity.between(reference, found)


def long_text(tokenizer: Any, length: int, seed: int) -> list[int]:
    """Token ids that begin as any text does, and go on with ordinary tokens in an order that does not repeat."""
    start = text_ids(tokenizer, CHECK_TEXTS[0])
    special = set(tokenizer.all_special_ids)
    words = [id for text in CHECK_TEXTS for id in text_ids(tokenizer, text) if id not in special]
    chosen = torch.randint(len(words), (length,), generator=torch.Generator().manual_seed(seed))
    return [*start[:1], *(words[i] for i in chosen.tolist())][:length]


def _positions(length: int) -> list[int]:
    sample = torch.linspace(0, length - 1, _SAMPLE).long().tolist()
    return sorted({*sample, *range(max(0, length - _LAST), length)})
