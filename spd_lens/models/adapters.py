"""LoRA adapters and full checkpoints on the twin: put on, taken off bit for bit, merged in float32."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from spd_lens.errors import UNREADABLE, SPDError
from spd_lens.stand_ins import refuse_stand_in
from spd_lens.storage import read_json


def adapter_base(directory: Path) -> str:
    """The model that a PEFT adapter directory names as its base."""
    try:
        base = read_json(directory / "adapter_config.json")["base_model_name_or_path"]
    except (SPDError, *UNREADABLE) as error:
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
    with _restored(twin):
        yield _wrap(twin, directory).eval()


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
    for file in (*directory.glob("*.json"), *directory.glob("*.safetensors")):
        refuse_stand_in(file)
    return directory


def _wrap(twin: PreTrainedModel, directory: Path) -> PeftModel:
    try:
        wrapped = PeftModel.from_pretrained(twin, str(directory), is_trainable=False)
        stored = _lora_keys(load_file(directory / "adapter_model.safetensors"))
    except Exception as error:  # peft, torch and safetensors raise many types on a damaged or foreign adapter
        reason = " ".join(str(error).split())[:300]
        raise SPDError(f"the adapter in {directory} does not fit {type(twin).__name__}: {reason}") from error
    # PEFT loads what it finds: an adapter of a deeper or shallower model would be taken in part, with a warning
    own = _lora_keys(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if stored != own:
        raise SPDError(
            f"the adapter in {directory} does not fit {type(twin).__name__}: {min(stored ^ own)} has no counterpart"
        )
    return wrapped


def _lora_keys(state: Iterable[str]) -> set[str]:
    return {key for key in state if "lora_" in key}


@contextlib.contextmanager
def _restored(twin: PreTrainedModel) -> Iterator[None]:
    """Afterwards the twin has its own layers again, no attribute of PEFT's, and frozen weights, whatever went wrong."""
    attributes = set(vars(twin))
    children = [(module, dict(module._modules)) for module in twin.modules()]
    try:
        yield
    finally:
        for module, own in children:
            module._modules.update(own)  # PEFT put its layers around them
        for name in set(vars(twin)) - attributes:  # and left its config on the model
            delattr(twin, name)
        twin.requires_grad_(False)


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
    try:
        for file in sorted(directory.glob("*.safetensors")):
            state |= load_file(file)
    except (SafetensorError, OSError) as error:
        raise SPDError(f"the checkpoint in {directory} cannot be read ({error}); make it again") from error
    for name, parameter in twin.named_parameters():
        if name not in state or state[name].shape != parameter.shape:
            found = f"has {name} as {tuple(state[name].shape)}" if name in state else f"lacks {name}"
            raise SPDError(f"the checkpoint in {directory} does not fit {type(twin).__name__}: it {found}")
    twin.load_state_dict(state, strict=False)
