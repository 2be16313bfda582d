"""`Shape`: what a plan has to know of a model, read from its configuration without a single weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from spd_lens.errors import SPDError, one_line
from spd_lens.models import n_kv_heads
from spd_lens.settings import DEFAULT_MODEL

_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
          "intermediate_size", "vocab_size", "tie_word_embeddings")  # fmt: skip
TABLE: dict[str, tuple[str, tuple[int, ...]]] = {
    DEFAULT_MODEL: ("llama", (30, 576, 9, 3, 64, 1536, 49152, True)),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", (24, 896, 14, 2, 64, 4864, 151936, True)),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", (28, 3584, 28, 4, 128, 18944, 152064, False)),
    "Qwen/Qwen2.5-14B-Instruct": ("qwen2", (48, 5120, 40, 8, 128, 13824, 152064, False)),
    "Qwen/Qwen3-4B": ("qwen3", (36, 2560, 32, 8, 128, 9728, 151936, True)),
    "Qwen/Qwen3-4B-Instruct-2507": ("qwen3", (36, 2560, 32, 8, 128, 9728, 151936, True)),
    "Qwen/Qwen3-235B-A22B-Instruct-2507": ("qwen3_moe", (94, 4096, 64, 4, 128, 12288, 151936, False)),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", (32, 4096, 32, 8, 128, 14336, 128256, False)),
    "meta-llama/Llama-3.1-70B-Instruct": ("llama", (80, 8192, 64, 8, 128, 28672, 128256, False)),
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": ("llama4_text", (48, 5120, 40, 8, 128, 8192, 202048, False)),
}
"""Architecture and `_SIZES` of models whose shape is known without the hub, as in their published config.json."""
_EXPERTS: dict[str, dict[str, int]] = {
    "Qwen/Qwen3-235B-A22B-Instruct-2507": {
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536,
    },
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": {
        "num_local_experts": 128, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 16384,
    },
}  # fmt: skip
"""What else the config.json of a mixture of experts says. Llama 4's sizes are those of its language model."""
_N_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configurations call the number of experts."""
_MOST_LAYERS = 1024


class Shape(NamedTuple):
    """Sizes of a decoder. Tied embeddings count once among its weights.

    In a mixture of experts, a token goes through some of the experts alone (`n_active` weights in all).
    """

    model: str
    n_params: int
    n_layers: int
    d_model: int
    n_kv_heads: int
    d_head: int
    d_vocab: int
    n_routed: int = 0
    """Weights of all experts among which a router chooses."""
    routed_share: float = 1.0
    """The share of them that a token goes through."""

    @property
    def n_active(self) -> float:
        """Weights that a token goes through."""
        return self.n_read(1)

    def n_read(self, n_tokens: int) -> float:
        """Weights that at least one of so many tokens goes through, where each token's experts are drawn evenly."""
        return self.n_params - self.n_routed * (1 - self.routed_share) ** n_tokens

    def __str__(self) -> str:
        active = f" ({self.n_active / 1e6:,.0f} million for a token)" if self.n_routed else ""
        return (
            f"{self.model}: {self.n_params / 1e6:,.0f} million weights{active}, {self.n_layers} layers, d_model "
            f"{self.d_model}, {self.n_kv_heads} KV heads of {self.d_head}, vocabulary {self.d_vocab}"
        )


def read_shape(model: str) -> Shape:
    """The shape of a hub model, a model directory or a `.gguf` file: from its configuration, no weights are read.

    Raises:
        SPDError: nothing tells the shape.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(model).expanduser()
    try:
        if path.is_file():
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        elif model in TABLE and not path.exists():
            architecture, sizes = TABLE[model]
            config = AutoConfig.for_model(
                architecture, **dict(zip(_SIZES, sizes, strict=True)), **_EXPERTS.get(model, {})
            )
        else:
            config = AutoConfig.from_pretrained(path if path.exists() else model)
    except (OSError, ValueError) as error:
        raise SPDError(
            f"the shape of {model!r} is not known here and the hub does not tell it "
            f"({one_line(error, 150)}); check the name or give a local directory"
        ) from error
    try:
        if (n_layers := config.get_text_config().num_hidden_layers) > _MOST_LAYERS:
            raise SPDError(f"{model} says num_hidden_layers = {n_layers}; check its config.json")
        with torch.device("meta"):  # parameters without numbers, to count them
            return shape_of(model, AutoModelForCausalLM.from_config(config))
    except (AttributeError, ValueError, TypeError) as error:
        raise SPDError(f"{model} is not a decoder that a study could be planned for ({error})") from error


def shape_of(model: str, decoder: Any) -> Shape:
    """The shape of a transformers model, whose weights may be without numbers."""
    text = decoder.config.get_text_config()
    sizes = {name: weight.numel() for name, weight in decoder.named_parameters()}
    n_routed = sum(size for name, size in sizes.items() if ".experts." in name)
    n_experts = next((n for name in _N_EXPERTS if (n := getattr(text, name, None))), 1)
    share = text.num_experts_per_tok / n_experts if n_routed else 1.0
    d_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    n_layers, d_vocab = text.num_hidden_layers, text.vocab_size
    return Shape(
        model, sum(sizes.values()), n_layers, text.hidden_size, n_kv_heads(text), d_head, d_vocab, n_routed, share
    )
