"""transformers' private interfaces, each behind a function: unlike PyTorch's, what they give is needed.

`tests/models/test_torch_private.py` says with which release each was seen to work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList
from transformers.utils.chat_template_utils import _compile_jinja_template


def template_environment() -> Any:
    """The environment in which chat templates are rendered, with its tags, filters and functions: an overlay."""
    return _compile_jinja_template("").environment.overlay()


def default_generation_settings() -> dict[str, Any]:
    """What `generate` sets where neither its caller nor a generation config does."""
    return GenerationConfig._get_default_generation_params()


def logits_processors(
    model: Any, settings: Mapping[str, Any], prompt_ids: Sequence[int], stop_ids: Sequence[int]
) -> LogitsProcessorList:
    """What `generate` puts the next token's logits through, for a batch of this prompt alone."""
    prepared = GenerationConfig(**settings)
    prepared._eos_token_tensor = torch.tensor(stop_ids, device=model.device) if stop_ids else None
    return model._get_logits_processor(
        generation_config=prepared,
        input_ids_seq_length=len(prompt_ids),
        encoder_input_ids=torch.tensor([prompt_ids], device=model.device),
        logits_processor=LogitsProcessorList(),
        device=model.device,
        model_kwargs={},
    )


def causal_class(config: Any) -> Any | None:
    """The class of causal language models with such a configuration; None if transformers has none."""
    return AutoModelForCausalLM._model_mapping.get(type(config), None)


def is_known_to(auto: Any, config: Any) -> bool:
    """Whether one of transformers' auto classes has a class for this configuration."""
    return type(config) in auto._model_mapping.keys()  # noqa: SIM118 (it is no dict)


def attention_implementation(config: Any) -> str:
    """The name of the attention that a model of this configuration calls."""
    return config._attn_implementation


def call_attention(config: Any, name: str) -> None:
    """Let a model of this configuration call another attention, without walking through all of its modules."""
    config._attn_implementation = name


def may_change_attention(model: Any) -> bool:
    """Whether a model lets another attention be set; transformers warns where it does not."""
    return model._can_set_attn_implementation()
