"""Where a site's weights live in a Hugging Face model."""

from __future__ import annotations

import re

from torch import nn

from spd_lens.errors import SPDError
from spd_lens.sites import Site

# Architectures with one linear layer per projection: Llama, SmolLM, Qwen2/3, Mistral, Gemma, OLMo, ...
_PATTERN = r"(?:^|\.)layers\.{layer}\.self_attn\.{kind}_proj$"


def projection_module(model: nn.Module, site: Site) -> nn.Module:
    """The linear layer whose output is the site's activation: `[batch, pos, head · d_head]`.

    On a model that carries a LoRA adapter it is PEFT's layer around it.

    Raises:
        SPDError: the architecture has no separate projection of this kind (fused QKV, latent attention).
    """
    pattern = re.compile(_PATTERN.format(layer=site.layer, kind=site.kind))
    found = [module for name, module in model.named_modules() if pattern.search(name)]
    if len(found) != 1:
        raise SPDError(
            f"{type(model).__name__} has no separate linear layer {site.kind}_proj in layer {site.layer}, so its "
            f"{site.kind.upper()} cannot be reached in the twin; use the lens model (engine='lens', projected)"
        )
    return found[0]
