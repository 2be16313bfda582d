"""Where a site's activation and weights are in a Hugging Face model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spd_lens.errors import SPDError
from spd_lens.models.architectures import architecture
from spd_lens.models.fingerprint import Fingerprint
from spd_lens.sites import Site


class UnknownLayer(SPDError):
    """The twin has no layer of the name that the table of architectures gives."""


@dataclass(frozen=True)
class SiteLayer:
    """The module that has a site's activation: `[batch, pos, head · d_head]`, or for `resid` `[batch, pos, d_model]`.

    For k, v and q it is among the outputs of a linear layer, for z the input of one, for resid the output of a block.
    On a model that carries an adapter it is PEFT's layer around it.
    """

    module: Any
    features: Int[Tensor, " feature"] | None
    """The output features that are the site's, in the order `head, d_head`; None for all."""
    reads: bool
    """Whether the layer reads the activation (z); otherwise it writes it."""

    @property
    def base(self) -> Any:
        """The layer below an adapter."""
        return getattr(self.module, "base_layer", self.module)

    @property
    def is_linear(self) -> bool:
        """Whether its weights, and a plain LoRA's beside them, are all that it computes with.

        DoRA divides by a norm of its weights, and other kinds of adapters scale, rotate or make weights anew in every
        pass: a map of its features would have to pass through all that.
        """
        if not of_peft(self.module):
            return True
        from peft.tuners import lora

        return type(self.module) is lora.Linear and not self.module.lora_variant and not self.module.merged

    @property
    def transposed(self) -> bool:
        """Whether its weight is `[in, out]` (GPT-2's Conv1D) and not `[out, in]`."""
        return isinstance(self.base, Conv1D)


def of_peft(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's, or derived from one.

    Told by its classes' names: to import PEFT takes a second, which a model without an adapter does not wait for.
    """
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def site_layer(model: nn.Module, site: Site) -> SiteLayer:
    """Find a site's layer; `SPDError` where the architecture has none."""
    layout = architecture(model)
    path = "" if site.kind == "resid" else f".{layout.modules[site.kind]}"
    pattern = re.compile(rf"(?:^|\.){re.escape(f'{layout.blocks}.{site.layer}{path}')}$")
    found = [module for name, module in _in_force(model) if pattern.search(name)]
    if len(found) != 1:
        raise UnknownLayer(
            f"{type(model).__name__} has no {layout.blocks}.{site.layer}{path}: it is not built like Llama, and "
            f"spd_lens does not know how, so its {site.kind} cannot be reached; choose another model, or other layers "
            "where only some have attention"
        )
    if site.kind == "resid":
        return SiteLayer(found[0], None, reads=False)
    shape = Fingerprint.of(model)
    features = layout.features(site.kind, shape.n_heads, shape.n_kv_heads, shape.d_head)
    return SiteLayer(found[0], features, reads=site.kind == "z")


def attention_layer(model: nn.Module, layer: int) -> nn.Module:
    """The attention of a block: the module around the layer that writes its output."""
    inner = site_layer(model, Site(layer, "z")).module
    return next(module for module in reversed(list(model.modules())) if inner in module.children())


def _in_force(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules under the names that they have without an adapter; a trained copy stands in for its original."""
    for name, module in model.named_modules():
        if ".original_module" not in name and not _saves_a_copy(module):
            yield re.sub(r"\.modules_to_save\.[^.]+", "", name), module


def _saves_a_copy(module: nn.Module) -> bool:
    if not of_peft(module):
        return False
    from peft.utils.other import ModulesToSaveWrapper

    return isinstance(module, ModulesToSaveWrapper)


def twin_hook(model: nn.Module, site: Site, function: Callable[[Tensor], Tensor]) -> Any:
    """Let `function` replace the site's activation in each forward pass; the handle's `remove()` ends that."""
    layer = site_layer(model, site)
    if layer.reads:
        return layer.module.register_forward_pre_hook(lambda _module, args: (function(args[0]), *args[1:]))

    def at_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # blocks of some architectures return more than the residual stream
            return (function(output[0]), *output[1:])
        if layer.features is None:
            return function(output)
        features = layer.features.to(output.device)
        return output.index_copy(-1, features, function(output[..., features]))

    return layer.module.register_forward_hook(at_output)


def positionwise_in_last_block(model: nn.Module) -> list[nn.Module]:
    """The parts of the last block that work on each position by itself, other than the layers that write K and V.

    The largest such modules: a whole MLP, and in the attention the projection of the queries (unless keys or values
    come out of the same layer) and that of the output.
    """
    last = Fingerprint.of(model).n_layers - 1
    writers = {site_layer(model, Site(last, kind)).module for kind in ("k", "v")}
    return list(_without(site_layer(model, Site(last, "resid")).module, writers))


def _without(module: nn.Module, excluded: set[Any]) -> Iterator[nn.Module]:
    """The outermost submodules that hold a linear layer and none of the excluded modules."""
    for child in module.children():
        if child in excluded:  # with all inside, which under an adapter is the layer itself
            continue
        inside = set(child.modules())
        if inside & excluded:
            yield from _without(child, excluded)
        elif any(isinstance(part, (nn.Linear, Conv1D)) for part in inside):
            yield child
