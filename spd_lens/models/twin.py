"""Running a transformers model, with the same outputs whichever settings were left on its configuration."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from spd_lens.errors import SPDError, one_line


def run_twin(model: Any, tokens: Int[Tensor, "batch pos"], **options: Any) -> Any:
    """One forward pass with named outputs, without attention weights and hidden states."""
    with named_outputs(model if hasattr(model, "config") else model.module):  # DDP shows no attribute of its model
        return model(input_ids=tokens, output_attentions=False, output_hidden_states=False, **options)


@contextlib.contextmanager
def named_outputs(model: Any) -> Iterator[None]:
    """While open, a model returns named outputs: with `return_dict` off, some of transformers' models fail."""
    config = model.config
    own = config.return_dict
    config.return_dict = True
    try:
        yield
    finally:
        config.return_dict = own


@contextlib.contextmanager
def runnable(model: Any, how: str) -> Iterator[None]:
    """Raise what a model that is no causal language model raises inside, as an `SPDError`."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, ValueError, IndexError, KeyError) as error:
        raise SPDError(
            f"{type(model).__name__} cannot be run on a short text{how} ({one_line(error)}); check its configuration "
            "or choose another model"
        ) from error


def check_saveable(model: Any) -> None:
    """Raise `SPDError` where transformers would refuse to save the model, before a training and not after it."""
    try:
        if model.generation_config is not None:
            model.generation_config.validate(strict=True)
    except ValueError as error:
        reason = next((line for line in str(error).splitlines() if line.startswith("- ")), str(error))
        raise SPDError(
            f"{type(model).__name__} could not be saved, as its generation config contradicts itself "
            f"({reason.removeprefix('- ')[:200]}); correct it in generation_config.json or pair.hf.generation_config"
        ) from error


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model in another dtype, as transformers reads it: rotary frequencies are buffers and stay float32, unlike in
    `to`."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float32."""
    return cast(copy.deepcopy(model), torch.float32)
