"""Leave no trace: model, global random generators and current device are afterwards what they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from spd_lens.models import random_kept


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has the attributes, submodules, hooks and flags it had, whatever went wrong inside.

    Weights are not copied: only what is added inside may be trained.
    """
    attributes = [(module, _snapshot(vars(module))) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    config: Any = model.config
    config_fields = dict(vars(config))
    try:
        yield
    finally:
        for module, (fields, tables) in attributes:
            vars(module).clear()
            vars(module).update(fields)
            for table, content in tables:  # the same dictionaries, as others may hold them
                table.clear()
                table.update(content)
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        vars(config).clear()
        vars(config).update(config_fields)


def _snapshot(fields: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[dict[Any, Any], dict[Any, Any]]]]:
    """A module's attributes, and the content of those that are dictionaries (submodules, parameters, hooks)."""
    return dict(fields), [(value, dict(value)) for value in fields.values() if isinstance(value, dict)]


@contextlib.contextmanager
def isolated_random(seed: int) -> Iterator[None]:
    """Seeds the global generators, which PEFT and Trainer draw from, and puts them back."""
    with random_kept():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Trainer takes the current CUDA device: make it the model's."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
