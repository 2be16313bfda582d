"""Models whose layers are on several devices, in memory or on the disk, as accelerate's hooks place and load them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate.utils.modeling import has_offloaded_params
from torch import Tensor, nn
from transformers.integrations.accelerate import load_offloaded_parameter

from spd_lens.errors import SPDError


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate moves what passes through the model, or loads its weights for each pass."""
    return hasattr(model, "_hf_hook")


def refuse_spread(model: nn.Module, what: str, instead: str) -> None:
    """Raise `SPDError` for `what` on a model that is on several devices; `instead` is what can be done."""
    if is_spread(model):
        places = sorted({str(place) for place in getattr(model, "hf_device_map", {}).values()})
        raise SPDError(
            f"{what} needs all weights on one device, and those of {type(model).__name__} are spread over "
            f"{', '.join(places) or 'several'}; {instead}"
        )


def check_spread(model: Any) -> None:
    """Refuse a model that cannot be run where it is: on several devices without accelerate's hooks, or with its
    embedding offloaded, to whose device token ids go, and off which the fingerprint is read.

    Raises:
        SPDError: it is such a model.
    """
    if not is_spread(model):
        places = sorted({parameter.device.type for parameter in model.parameters()})
        if len({parameter.device for parameter in model.parameters()}) > 1 or places == ["meta"]:
            raise SPDError(
                f"the weights of {type(model).__name__} are on {', '.join(places)}, and no hook of accelerate's moves "
                "or loads anything; load it with spd_lens.load, and name a device for every part in a device_map"
            )
        return
    embedding = model.get_input_embeddings().weight
    if embedding.is_meta or model.device != embedding.device:
        raise SPDError(
            f"the embedding of {type(model).__name__} is offloaded, and it must be on a device that computes: name one "
            "for it in device_map, such as {'model.embed_tokens': 0, ...}"
        )


def stored_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """All parameters by name with their numbers, wherever these are; what is offloaded is loaded one at a time."""
    for name, parameter in model.named_parameters():
        yield name, load_offloaded_parameter(model, name) if parameter.is_meta else parameter


@contextlib.contextmanager
def writable(layer: Any) -> Iterator[dict[str, Tensor]]:
    """A layer's own parameters by name, to be read and written to; what is written counts in passes.

    Those of an offloaded layer are copies in memory while the context is open, and afterwards the layer has what is
    stored again: nothing is written to the disk. Other parameters are the layer's own, to be put back by the caller.
    """
    if not has_offloaded_params(layer):
        yield dict(layer.named_parameters(recurse=False))
        return
    hook = layer._hf_hook
    stored = hook.weights_map
    hook.weights_map = {name: stored[name].clone() for name, _ in layer.named_parameters(recurse=False)}
    try:
        yield hook.weights_map
    finally:
        hook.weights_map = stored
