"""A projection as a LoRA adapter: which low-rank change of which layer it is, and PEFT's directory that holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from spd_lens.errors import SPDError
from spd_lens.files import filling, is_free
from spd_lens.models import SiteLayer, site_layer
from spd_lens.sites import Site

if TYPE_CHECKING:
    from peft import LoraConfig

ORIGIN = "projection.json"
"""Beside PEFT's files: the subspace by its digest, the model's name and weights, and the strength."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM 0.32 takes for `--max-lora-rank` (`MaxLoRARanks` in its `vllm/config/lora.py`)."""


@dataclass(frozen=True)
class _Change:
    """`x -> x (B A)ᵀ + bias`, which is added to what a linear layer computes; float64."""

    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "d_out rank"]
    bias: Float[Tensor, " d_out"]

    def __add__(self, other: _Change) -> _Change:
        """Both at once: the ranks add up."""
        return _Change(torch.cat([self.a, other.a]), torch.cat([self.b, other.b], dim=1), self.bias + other.bias)


def write_lora(
    hf: Any,
    directory: str | Path,
    removed: Mapping[Site, Float[Tensor, "feature rank"]],
    constants: Mapping[Site, Float[Tensor, " feature"]],
    strength: float,
    origin: Mapping[str, Any],
) -> Path:
    """Write the adapter that takes some directions out of a model's activations: `x -> x (I - C Cᵀ) + c`.

    Args:
        hf: The model whose weights the adapter goes with.
        directory: The adapter's directory, which must be free.
        removed: Orthonormal directions `C` of each site, float64, over its features in the order `head, d_head`.
        constants: What is added at each site, `c`.
        strength: What scales the change.
        origin: What `projection.json` says of where the adapter comes from.

    Raises:
        SPDError: something is in the directory; or nothing is removed.
    """
    from peft.utils import SAFETENSORS_WEIGHTS_NAME  # takes a second, which a projection without one does not wait for

    directory = Path(directory)
    if not is_free(directory):
        raise SPDError(f"{directory} is not empty; give a new directory for the adapter")
    names = {module: name for name, module in hf.named_modules()}
    layers = {site: site_layer(hf, site) for site in removed if removed[site].shape[1]}  # PEFT has no rank of 0
    changes: dict[str, _Change] = {}
    for site, layer in layers.items():
        name, change = names[layer.module], _change(layer, removed[site], constants[site])
        changes[name] = changes[name] + change if name in changes else change  # k and v of a fused layer
    if not changes:
        raise SPDError(
            "the subspace keeps every direction at all of its sites, so that an adapter would have nothing to change; "
            "serve the model itself, or take a lower rank"
        )
    config = _config(hf.config, changes, strength, transposed=any(layer.transposed for layer in layers.values()))
    parts = {f"{name}.lora_A.weight": change.a for name, change in changes.items()}
    parts |= {f"{name}.lora_B.weight": change.b for name, change in changes.items()}
    if config.lora_bias:
        parts |= {f"{name}.lora_B.bias": change.bias for name, change in changes.items()}
    tensors = {f"base_model.model.{name}": part.float().contiguous() for name, part in parts.items()}
    with filling(directory) as scratch:
        config.save_pretrained(str(scratch))
        # of several entries of a header the order changes, and the file's digest is to name the adapter
        save_file(tensors, scratch / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        (scratch / ORIGIN).write_text(json.dumps({**origin, "strength": strength}, indent=1) + "\n", encoding="utf-8")
    return directory


def vllm_note(adapter: str | Path) -> str:
    """One sentence: with which options vLLM serves an adapter that `to_lora` wrote, or why it does not."""
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(adapter))
    rank = max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r
    why = f"its rank {rank} is above {VLLM_RANKS[-1]}" if rank > VLLM_RANKS[-1] else ""
    why = "it has a LoRA bias" if config.lora_bias else why
    if why:
        return (
            f"vLLM does not take this adapter, because {why}: serve a checkpoint of the projected model there instead"
        )
    return f"vLLM takes it with --enable-lora --max-lora-rank {next(room for room in VLLM_RANKS if room >= rank)}"


def _change(layer: SiteLayer, removed: Float[Tensor, "feature rank"], constant: Float[Tensor, " feature"]) -> _Change:
    weight = _wide(layer.base.weight.T if layer.transposed else layer.base.weight)  # [d_out, d_in]
    d_out = weight.shape[0]
    if layer.reads:  # W (I - C Cᵀ), and the bias is added behind it
        return _Change(removed.T, -weight @ removed, torch.zeros(d_out, dtype=weight.dtype))
    features = torch.arange(d_out) if layer.features is None else layer.features.cpu()
    b, bias = torch.zeros(d_out, removed.shape[1], dtype=weight.dtype), torch.zeros(d_out, dtype=weight.dtype)
    b[features], bias[features] = removed, constant
    if layer.base.bias is not None:
        bias[features] -= removed @ (removed.T @ _wide(layer.base.bias)[features])
    return _Change(-removed.T @ weight[features], b, bias)


def _wide(parameter: Tensor) -> Tensor:
    return parameter.detach().cpu().double()


def _config(model: Any, changes: Mapping[str, _Change], strength: float, *, transposed: bool) -> LoraConfig:
    from peft import LoraConfig, TaskType

    ranks = {name: change.a.shape[0] for name, change in changes.items()}
    r = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != r}
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=getattr(model, "_name_or_path", "") or None,
        inference_mode=True,
        r=r,
        lora_alpha=strength * r,  # type: ignore[arg-type]  # a fraction works too
        rank_pattern=others,
        alpha_pattern={name: strength * rank for name, rank in others.items()},
        target_modules=list(ranks),
        lora_bias=any(bool(change.bias.any()) for change in changes.values()),
        fan_in_fan_out=transposed,
    )
    config.target_modules = sorted(ranks)  # PEFT makes a set of it, in no order
    return config
