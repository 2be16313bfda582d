"""LoRA adapters and full checkpoints on the twin: put on, taken off bit for bit, merged in float32."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from spd_lens.errors import SPDError


def adapter_base(directory: Path) -> str:
    """The model that a PEFT adapter directory names as its base."""
    try:
        base = json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise SPDError(f"{directory} holds no readable adapter_config.json: {error}") from error
    if not base:
        raise SPDError(f"the adapter in {directory} does not name its base model; load the base and pass adapter=")
    return base


@contextlib.contextmanager
def adapted(twin: PreTrainedModel, adapter: str | Path | None) -> Iterator[nn.Module]:
    """The twin with an adapter on, unmerged; off again always, with the twin's original bits.

    `adapter` is a PEFT directory, or the directory of a whole fine-tuned checkpoint of the same architecture. None
    yields the twin itself.
    """
    if adapter is None:
        yield twin
        return
    directory = check_adapter(adapter)
    if not (directory / "adapter_config.json").exists():
        with _swapped(twin, directory):
            yield twin
        return
    before = {name: value for name, value in vars(twin).items() if not name.startswith("_modules")}
    wrapped = _wrap(twin, directory)
    try:
        yield wrapped.eval()
    finally:
        wrapped.unload()
        for name in set(vars(twin)) - set(before):  # PEFT leaves its config on the model it wrapped
            delattr(twin, name)
        twin.requires_grad_(False)


def merged_copy(twin: PreTrainedModel, adapter: str | Path | None) -> PreTrainedModel:
    """A float32 copy of the twin with the adapter merged in; the twin is left alone."""
    wide = copy.deepcopy(twin).to(torch.float32)
    if adapter is None:
        return wide
    directory = check_adapter(adapter)
    if not (directory / "adapter_config.json").exists():
        _load_weights(wide, directory)
        return wide
    merged: Any = _wrap(wide, directory).merge_and_unload(safe_merge=True)
    return merged


def check_adapter(adapter: str | Path) -> Path:
    """The adapter's directory, or `SPDError` if it holds neither a PEFT adapter nor a checkpoint in safetensors."""
    directory = Path(adapter)
    if (directory / "adapter_config.json").exists() and not (directory / "adapter_model.safetensors").exists():
        raise SPDError(f"{directory} has no adapter_model.safetensors (pickled adapters are not read)")
    if not any((directory / name).exists() for name in ("adapter_config.json", "config.json")):
        raise SPDError(f"{directory} is not an adapter: it has neither adapter_config.json nor config.json")
    return directory


def _wrap(twin: PreTrainedModel, directory: Path) -> PeftModel:
    try:
        return PeftModel.from_pretrained(twin, str(directory), is_trainable=False)
    except (ValueError, RuntimeError, OSError) as error:
        raise SPDError(f"the adapter in {directory} does not fit {type(twin).__name__}: {error}") from error


@contextlib.contextmanager
def _swapped(twin: PreTrainedModel, directory: Path) -> Iterator[None]:
    saved = {name: parameter.detach().clone() for name, parameter in twin.named_parameters()}
    try:
        _load_weights(twin, directory)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.copy_(saved[name])


def _load_weights(twin: PreTrainedModel, directory: Path) -> None:
    state: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        state |= load_file(file)
    missing = [name for name, _ in twin.named_parameters() if name not in state]
    if missing:
        raise SPDError(f"the checkpoint in {directory} does not fit {type(twin).__name__}: it lacks {missing[0]}")
    twin.load_state_dict(state, strict=False)
