"""Which layers get LoRA matrices: the paper's four projections, under the names that the architecture has for them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from spd_lens.errors import SPDError
from spd_lens.models import architecture

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The paper's LoRA targets (appendix A.3)."""


def resolve_targets(twin: nn.Module, targets: Sequence[str]) -> tuple[str, ...]:
    """Names of linear layers as PEFT matches them: by the end of their path.

    A name of the paper's that the model does not have stands for the layer that does its work there: all of `q_proj`,
    `k_proj` and `v_proj` are `attn.c_attn` in GPT-2.

    Raises:
        SPDError: the model has no linear layer of that name.
    """
    linear = [name for name, module in twin.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    found: list[str] = []
    missing: list[str] = []
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in linear):
            found.append(target)
        elif target in ATTENTION:
            found.append(architecture(twin).modules["qkvz"[ATTENTION.index(target)]])
        else:
            missing.append(target)
    if missing or not targets:
        # PEFT takes a list of which one name exists, and leaves the others out without a word
        raise SPDError(
            f"{type(twin).__name__} has no linear layer named {', '.join(missing) or '(none given)'}; "
            f"choose targets from {', '.join(sorted({name.rpartition('.')[2] for name in linear}))}"
        )
    return tuple(dict.fromkeys(found))
