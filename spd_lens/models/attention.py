"""Which of transformers' attentions is fastest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_SHORT = 512
"""Tokens up to which attention weights are small beside the other activations."""


@contextlib.contextmanager
def fastest_attention(model: Any, length: int) -> Iterator[None]:
    """In bfloat16 on a CPU plain matrix products: torch's kernel takes twice as long there, forth and back.

    They keep all attention weights for the backward pass, so not where sequences are long.
    """
    own = model.config._attn_implementation
    fitting = model.dtype == torch.bfloat16 and model.device.type == "cpu" and length <= _SHORT
    if not fitting or own != "sdpa" or not model._can_set_attn_implementation():  # it warns where it cannot
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(own)
