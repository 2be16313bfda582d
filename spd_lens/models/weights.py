"""Where a site's activation and weights live in a Hugging Face model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from spd_lens.errors import SPDError
from spd_lens.sites import Site

# Architectures with one linear layer per projection: Llama, SmolLM, Qwen2/3, Mistral, Gemma, OLMo, ...
_LAYER = r"(?:^|\.)layers\.{layer}"
_MODULES = {
    "k": r"\.self_attn\.k_proj$",
    "v": r"\.self_attn\.v_proj$",
    "q": r"\.self_attn\.q_proj$",
    "z": r"\.self_attn\.o_proj$",
    "resid": r"$",
}


def site_module(model: nn.Module, site: Site) -> nn.Module:
    """The module that has the site's activation: `[batch, pos, head · d_head]`, or for `resid` `[batch, pos, d_model]`.

    For k, v and q it is the output of a linear layer, for z the input of one, for resid the output of a whole block.
    On a model that carries a LoRA adapter it is PEFT's layer around it.

    Raises:
        SPDError: the architecture has no separate projection of this kind (fused QKV, latent attention).
    """
    pattern = re.compile(_LAYER.format(layer=site.layer) + _MODULES[site.kind])
    found = [module for name, module in model.named_modules() if pattern.search(name)]
    if len(found) != 1:
        raise SPDError(
            f"{type(model).__name__} has no module of its own for {site.kind} in layer {site.layer} (as Llama has "
            f"k_proj), so its {site.kind.upper()} cannot be reached in the twin; use the lens model (engine='lens', "
            "projected)"
        )
    return found[0]


def twin_hook(model: nn.Module, site: Site, function: Callable[[Tensor], Tensor]) -> Any:
    """Let `function` replace the site's activation in each forward pass; the handle's `remove()` ends that."""
    module = site_module(model, site)
    if site.kind == "z":
        return module.register_forward_pre_hook(lambda _module, args: (function(args[0]), *args[1:]))

    def at_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # blocks of some architectures return more than the residual stream
            return (function(output[0]), *output[1:])
        return function(output)

    return module.register_forward_hook(at_output)
