"""Where K, V and Q live in each architecture's weights, and how they split into heads: one table, no code per model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor, nn

from spd_lens.errors import SPDError

_N = TypeVar("_N", int, float)
Fusion = Literal["parts", "heads", "groups"]
"""How one layer's output features hold queries, keys and values.

- `parts`: all queries, then all keys, then all values (GPT-2, Phi-3; Falcon with one KV head).
- `heads`: for each head its query, its key, its value (GPT-NeoX; Falcon without multi-query).
- `groups`: for each KV head its group's queries, its key, its value (Falcon's new decoder).
"""


@dataclass(frozen=True)
class Architecture:
    """Paths are below the transformer's list of blocks."""

    blocks: str = "model.layers"
    """Path of the list of blocks."""
    modules: Mapping[str, str] = field(
        default_factory=lambda: {kind: f"self_attn.{name}_proj" for kind, name in zip("kvqz", "kvqo", strict=True)}
    )
    """The linear layer that writes each kind; for `z`, the one that reads it."""
    fusion: Fusion | None = None
    """How a fused layer holds k, v and q; None where each of them has a layer of its own."""
    refused: str = ""
    """Why there is nothing to project; empty where there is something."""
    slots: bool = True
    """Whether tests show that the architecture takes the masks and positions of `slots` as they are meant."""

    def features(self, kind: str, n_heads: int, n_kv_heads: int, d_head: int) -> Int[Tensor, " feature"] | None:
        """Which output features of the layer are this kind's, in the order `head, d_head`; None for all."""
        if self.fusion is None or kind == "z":
            return None
        group = n_heads // n_kv_heads
        if self.fusion == "parts":
            sizes = [n * d_head for n in (n_heads, n_kv_heads, n_kv_heads)]
            return torch.arange(sum(sizes)).split(sizes)["qkv".index(kind)]
        if self.fusion == "heads" and group != 1:
            raise SPDError(
                f"a layer that holds query, key and value head by head needs as many KV heads as query heads, not "
                f"{n_kv_heads} and {n_heads}; this checkpoint is laid out in a way that spd_lens does not know"
            )
        rows = torch.arange(n_kv_heads * (group + 2) * d_head)
        rows = rearrange(rows, "(kv part d) -> kv part d", kv=n_kv_heads, d=d_head)
        part = {"q": rows[:, :group], "k": rows[:, group : group + 1], "v": rows[:, group + 1 :]}[kind]
        return part.flatten()


def _attention(block: str, attention: str, fused: str, out: str, fusion: Fusion) -> Architecture:
    return Architecture(block, {**dict.fromkeys("kvq", f"{attention}.{fused}"), "z": f"{attention}.{out}"}, fusion)


_LLAMA = Architecture()
_LATENT = Architecture(
    refused="its attention compresses keys and values into one latent vector, so that no matrix writes a head's K or V"
)

ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(
        "llama smollm3 mistral qwen2 qwen3 gemma gemma2 gemma3_text olmo olmo2 mixtral qwen2_moe qwen3_moe".split(),
        _LLAMA,
    ),
    "phi": replace(_LLAMA, modules={**_LLAMA.modules, "z": "self_attn.dense"}),
    "opt": replace(_LLAMA, blocks="model.decoder.layers", modules={**_LLAMA.modules, "z": "self_attn.out_proj"}),
    # its masks of local attention count columns, not positions
    "gpt_neo": Architecture(
        "transformer.h", {**{k: f"attn.attention.{k}_proj" for k in "kvq"}, "z": "attn.attention.out_proj"}, slots=False
    ),
    # their biases of distance are made from masks of padding
    "bloom": replace(_attention("transformer.h", "self_attention", "query_key_value", "dense", "heads"), slots=False),
    "mpt": replace(_attention("transformer.blocks", "attn", "Wqkv", "out_proj", "parts"), slots=False),
    "gptj": Architecture("transformer.h", {**{k: f"attn.{k}_proj" for k in "kvq"}, "z": "attn.out_proj"}),
    "gpt2": _attention("transformer.h", "attn", "c_attn", "c_proj", "parts"),
    "phi3": _attention("model.layers", "self_attn", "qkv_proj", "o_proj", "parts"),
    "gpt_neox": _attention("gpt_neox.layers", "attention", "query_key_value", "dense", "heads"),
    "falcon": _attention("transformer.h", "self_attention", "query_key_value", "dense", "parts"),
    **dict.fromkeys("deepseek_v2 deepseek_v3".split(), _LATENT),
}
"""By the configuration's `model_type`. Tests run each of them in every TransformerLens backend that knows it."""


# A whole text may be longer than what these count where positions are relative, but nothing was trained there.
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")


def numbers_in(value: Any, name: str = "", kind: type[_N] = int) -> Iterator[tuple[str, _N]]:
    """All numbers of a kind (whole ones) in nested settings, each with its innermost name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from numbers_in(inner, str(key), kind)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from numbers_in(inner, name, kind)
    elif isinstance(value, kind) and not isinstance(value, bool):
        yield name, value


def context_length(config: Any) -> int | None:
    """Longest sequence that a configuration says the model was made for, in tokens; None where it does not say."""
    config = config.get_text_config()
    found = (getattr(config, name, None) for name in _CONTEXT)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)


def angles_change_beyond(config: Any) -> int | None:
    """The length in tokens at which a model takes other rotary angles for a whole batch, by its longest row.

    So transformers computes LongRoPE: a short row beside a long one is another row than alone. None for other models.
    """
    config = config.get_text_config()
    named = [value for value in config.to_dict().values() if isinstance(value, dict)]
    named += [
        value for outer in named for value in outer.values() if isinstance(value, dict)
    ]  # one for each kind of layer
    for rope in named:
        if "longrope" in (rope.get("rope_type"), rope.get("type")):
            found = rope.get("original_max_position_embeddings")
            return found or getattr(config, "original_max_position_embeddings", None) or context_length(config)
    return None


def n_kv_heads(config: Any) -> int:
    """Key/value heads, under the names that configurations have for them."""
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else config.num_attention_heads
    for name in ("num_key_value_heads", "num_kv_heads"):
        if found := getattr(config, name, None):
            return int(found)
    return int(config.num_attention_heads)


def is_known(model: nn.Module) -> bool:
    """Whether a transformers model's architecture is in the table."""
    config: Any = model.config
    return config.get_text_config().model_type in ARCHITECTURES


def takes_slots(model: nn.Module) -> bool:
    """Whether its completions may be made in slots: tests show that for the architectures of the table."""
    return is_known(model) and architecture(model).slots


def architecture(model: nn.Module) -> Architecture:
    """The architecture of a transformers model, with or without an adapter on it.

    One that is not in the table is taken to be built like Llama, as most are; `probe` finds out whether that holds when
    a pair is made.

    Raises:
        SPDError: the architecture has no K and V to project.
    """
    return architecture_of(model.config, type(model).__name__)


def architecture_of(config: Any, name: str) -> Architecture:
    """The architecture that a configuration describes; `name` is what a message calls the model. As `architecture`."""
    config = config.get_text_config()
    found = ARCHITECTURES.get(config.model_type, _LLAMA)
    if config.model_type == "falcon" and config.new_decoder_architecture:
        found = replace(found, fusion="groups")
    elif config.model_type == "falcon" and not config.multi_query:
        found = replace(found, fusion="heads")
    if found.refused:
        raise SPDError(f"{name} cannot be projected: {found.refused}; choose another model")
    return found
