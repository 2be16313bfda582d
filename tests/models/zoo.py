"""Tiny random models of every architecture in the table, as their own configurations build them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from spd_lens.models.pair import ModelPair
from tests.conftest import build_tokenizer, randomise

_STANDARD = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
}
_GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256, "n_ctx": 256}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Member:
    """One architecture: how to build it, and which backends take it."""

    family: str
    """The prefix of its classes in transformers."""
    options: dict[str, Any] = field(default_factory=dict)
    hooked: bool = True
    """Whether transformer-lens 3.9 converts it to a HookedTransformer."""
    bridge: bool = True
    hooked_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    """Those in which HookedTransformer runs."""
    without: tuple[str, ...] = ()
    """Standard settings that its configuration does not have."""
    config: str = ""
    model: str = ""

    @property
    def window(self) -> int:
        """Of its local attention, in tokens; 0 for none."""
        return self.options.get("sliding_window", self.options.get("window_size", 0))


ZOO: dict[str, Member] = {
    "llama": Member("Llama", {"head_dim": 8}),
    "smollm3": Member("SmolLM3", hooked=False),
    "mistral": Member("Mistral", {"head_dim": 8, "sliding_window": 16}),
    "qwen2": Member("Qwen2"),
    # HookedTransformer takes no notice of the window
    "qwen2, sliding window": Member(
        "Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, hooked=False
    ),
    "qwen3": Member("Qwen3", {"head_dim": 8}),
    "gemma": Member("Gemma", {"head_dim": 8}, hooked=False),
    "gemma2": Member("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}, hooked=False),
    "gemma3_text": Member(
        "Gemma3",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
        hooked=False,
        config="Gemma3TextConfig",
    ),
    "phi": Member("Phi", {"partial_rotary_factor": 0.5}, hooked=False),
    "phi3": Member("Phi3", hooked=False),
    "opt": Member(
        "OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}, without=("num_key_value_heads", "intermediate_size")
    ),
    "gpt2": Member("GPT2", _GPT2, without=tuple(_STANDARD), model="GPT2LMHeadModel"),
    "gpt_neo": Member(
        "GPTNeo",
        {
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 16,
            "max_position_embeddings": 256,
        },
        without=tuple(_STANDARD),
    ),
    "bloom": Member(
        "Bloom",
        {"hidden_size": 32, "n_layer": 4, "n_head": 4, "seq_length": 256},
        hooked=False,
        without=tuple(_STANDARD),
    ),
    "mpt": Member(
        "Mpt", {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 256}, hooked=False, without=tuple(_STANDARD)
    ),
    "gptj": Member("GPTJ", {**_GPT2, "rotary_dim": 4}, without=tuple(_STANDARD)),
    "gpt_neox": Member("GPTNeoX", {"rotary_pct": 0.25}, without=("num_key_value_heads",)),
    "falcon, one KV head": Member(
        "Falcon", {"multi_query": True}, hooked=False, without=("num_key_value_heads", "intermediate_size")
    ),
    "falcon, all heads": Member(
        "Falcon", {"multi_query": False}, hooked=False, without=("num_key_value_heads", "intermediate_size")
    ),
    "falcon, groups": Member(
        "Falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        hooked=False,
        bridge=False,
        without=("num_key_value_heads", "intermediate_size"),
    ),
    "olmo": Member("Olmo", hooked=False),
    "olmo2": Member("Olmo2", hooked=False),
    # its router is float32 whatever the rest is
    "mixtral": Member("Mixtral", {"num_local_experts": 4}, hooked_dtypes=(torch.float32,)),
    "qwen2_moe": Member("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 32}, hooked=False),
    "qwen3_moe": Member("Qwen3Moe", {**_EXPERTS, "head_dim": 8}, hooked=False),
}


def build_twin(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model, with random weights and biases."""
    member = ZOO[name]
    tokenizer = build_tokenizer(chat=False)
    sizes = {key: value for key, value in _STANDARD.items() if key not in member.without}
    config = getattr(transformers, member.config or f"{member.family}Config")(
        vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=2, **sizes, **member.options
    )
    model = getattr(transformers, member.model or f"{member.family}ForCausalLM")(config)
    randomise(model, std=0.15)
    if member.family.startswith("Gemma"):  # whose norms multiply by 1 + weight
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "norm" in key:
                    parameter.sub_(1.0)
    return model.to(dtype)


def build_pair(name: str, backend: str, dtype: torch.dtype = torch.float32) -> ModelPair:
    """The model as a pair."""
    return ModelPair(build_twin(name, dtype), build_tokenizer(chat=False), backend=backend)
