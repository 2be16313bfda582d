"""`Shape`: what a plan has to know of a model, read from its configuration without a single weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spd_lens.config import DEFAULT_MODEL
from spd_lens.errors import SPDError, one_line
from spd_lens.models.architectures import context_length


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder with separate projections."""

    model: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_ff: int
    d_vocab: int
    n_params: int
    """All weights; tied embeddings count once."""
    n_ctx: int
    known_from: str
    """Where the shape was found."""

    @property
    def n_block_params(self) -> int:
        """Weights that every token is multiplied with below the unembedding."""
        attention = self.d_model * self.d_head * (2 * self.n_heads + 2 * self.n_kv_heads)
        return self.n_layers * (attention + 3 * self.d_model * self.d_ff)

    def widths(self, module: str) -> tuple[int, int] | None:
        """Inputs and outputs of a linear layer by its name in the twin; None for a name that is not known."""
        q, kv = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        return {
            "q_proj": (self.d_model, q),
            "k_proj": (self.d_model, kv),
            "v_proj": (self.d_model, kv),
            "o_proj": (q, self.d_model),
            "gate_proj": (self.d_model, self.d_ff),
            "up_proj": (self.d_model, self.d_ff),
            "down_proj": (self.d_ff, self.d_model),
        }.get(module)

    def __str__(self) -> str:
        return (
            f"{self.model}: {self.n_params / 1e6:,.0f} million weights, {self.n_layers} layers, d_model "
            f"{self.d_model}, {self.n_heads} heads and {self.n_kv_heads} KV heads of {self.d_head}, d_ff "
            f"{self.d_ff}, vocabulary {self.d_vocab} ({self.known_from})"
        )


# name: architecture, layers, d_model, heads, KV heads, d_head, d_ff, vocabulary, tied embeddings, context.
# As in the models' published config.json; the numbers of weights that follow are tested against the published ones.
_TABLE: dict[str, tuple[str, int, int, int, int, int, int, int, bool, int]] = {
    DEFAULT_MODEL: ("llama", 30, 576, 9, 3, 64, 1536, 49152, True, 8192),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", 24, 896, 14, 2, 64, 4864, 151936, True, 32768),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, False, 32768),
    "Qwen/Qwen2.5-14B-Instruct": ("qwen2", 48, 5120, 40, 8, 128, 13824, 152064, False, 32768),
    "Qwen/Qwen3-4B": ("qwen3", 36, 2560, 32, 8, 128, 9728, 151936, True, 40960),
    "Qwen/Qwen3-4B-Instruct-2507": ("qwen3", 36, 2560, 32, 8, 128, 9728, 151936, True, 262144),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", 32, 4096, 32, 8, 128, 14336, 128256, False, 131072),
}

_MOST_LAYERS = 1024


def known() -> list[str]:
    """Models whose shape is known without the hub."""
    return list(_TABLE)


def read_shape(model: str) -> Shape:
    """The shape of a hub model, a model directory or a `.gguf` file: from its configuration, no weights are read.

    A local directory and the hub's cache are asked first, then the table of this module, then the hub.

    Raises:
        SPDError: nothing tells the shape.
    """
    from transformers import AutoConfig

    path = Path(model).expanduser()
    if path.is_file():
        return _shape(model, _ask(model, str(path.parent), gguf_file=path.name), "from the file")
    if path.is_dir():
        return _shape(model, _ask(model, str(path)), "from the directory")
    try:
        return _shape(model, AutoConfig.from_pretrained(model, local_files_only=True), "from the hub's cache")
    except (OSError, ValueError):
        pass  # not in the cache
    if model in _TABLE:
        return _shape(model, _built_in(model), "from the built-in table")
    return _shape(model, _ask(model, model), "from the hub")


def _ask(model: str, place: str, **options: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise SPDError(
            f"the shape of {model!r} is not known here and the hub does not tell it "
            f"({one_line(error, 150)}); check the name or give a local directory"
        ) from error


def _built_in(model: str) -> Any:
    from transformers import AutoConfig

    architecture, n_layers, d_model, n_heads, n_kv_heads, d_head, d_ff, d_vocab, tied, n_ctx = _TABLE[model]
    return AutoConfig.for_model(
        architecture,
        num_hidden_layers=n_layers,
        hidden_size=d_model,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=d_head,
        intermediate_size=d_ff,
        vocab_size=d_vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=n_ctx,
    )


def _shape(model: str, config: Any, known_from: str) -> Shape:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        if (n_layers := config.get_text_config().num_hidden_layers) > _MOST_LAYERS:
            raise SPDError(f"{model} says num_hidden_layers = {n_layers}; check its config.json")
        with torch.device("meta"):  # parameters without numbers, to count them
            n_params = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        return shape_of(model, config, n_params, known_from)
    except (AttributeError, ValueError, TypeError) as error:
        raise SPDError(f"{model} is not a decoder that a study could be planned for ({error})") from error


def shape_of(model: str, config: Any, n_params: int, known_from: str = "loaded") -> Shape:
    """The shape in a transformers config."""
    text = config.get_text_config()
    n_heads = text.num_attention_heads
    return Shape(
        model=model,
        n_layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        n_heads=n_heads,
        n_kv_heads=getattr(text, "num_key_value_heads", None) or n_heads,
        d_head=getattr(text, "head_dim", None) or text.hidden_size // n_heads,
        d_ff=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        d_vocab=text.vocab_size,
        n_params=n_params,
        n_ctx=context_length(config) or 0,
        known_from=known_from,
    )
