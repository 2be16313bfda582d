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
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", (32, 4096, 32, 8, 128, 14336, 128256, False)),
}
"""Architecture and `_SIZES` of models whose shape is known without the hub, as in their published config.json."""
_MOST_LAYERS = 1024


class Shape(NamedTuple):
    """Sizes of a decoder. Tied embeddings count once among its weights."""

    model: str
    n_params: int
    n_layers: int
    d_model: int
    n_kv_heads: int
    d_head: int
    d_vocab: int

    def __str__(self) -> str:
        return (
            f"{self.model}: {self.n_params / 1e6:,.0f} million weights, {self.n_layers} layers, d_model "
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
            config = AutoConfig.for_model(architecture, **dict(zip(_SIZES, sizes, strict=True)))
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
            n_params = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        return shape_of(model, config, n_params)
    except (AttributeError, ValueError, TypeError) as error:
        raise SPDError(f"{model} is not a decoder that a study could be planned for ({error})") from error


def shape_of(model: str, config: Any, n_params: int) -> Shape:
    """The shape in a transformers config."""
    text = config.get_text_config()
    d_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    n_layers, d_vocab = text.num_hidden_layers, text.vocab_size
    return Shape(model, n_params, n_layers, text.hidden_size, n_kv_heads(text), d_head, d_vocab)
