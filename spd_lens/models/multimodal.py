"""The language model inside a model that also reads images, sound or video."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from spd_lens.errors import SPDError, one_line
from spd_lens.models.device_map import refuse_spread
from spd_lens.models.neutral import neutral
from spd_lens.models.parity import Parity
from spd_lens.models.transformers_private import attention_implementation, call_attention, causal_class, is_known_to
from spd_lens.models.twin import run_twin

_OTHER_SENSES = ("vision", "image", "audio", "speech", "video", "perceiver", "qformer", "vq", "vlm")
# Their positions have three parts, which are one and the same in a text: without images they are these models.
_SAME_ON_TEXT = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
_N_TOKENS = 24


def text_part(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model of a multimodal model, with the same weights; any other model as it is.

    It is compared with the whole model on a text.

    Raises:
        SPDError: transformers has no class for the language model alone, or it says something else than the whole does.
    """
    config: Any = model.config
    senses = [name for name in getattr(config, "sub_configs", None) or {} if name.startswith(_OTHER_SENSES)]
    if not senses:
        return model
    refuse_spread(model, "taking the text part of a multimodal model", "save the text part, and load that")
    text = config.get_text_config(decoder=True)
    named = f"{type(model).__name__} is multimodal (its configuration has {', '.join(senses)})"
    instead = (
        "give its language model alone, as a transformers causal language model, or the text model it was made from"
    )
    part = None if text is config else _language_model(model, text)
    if part is None:
        raise SPDError(
            f"{named}, and transformers has no causal language model for its text part ({text.model_type}), which "
            f"is all that spd_lens works on; {instead}"
        )
    if part not in set(model.modules()) and (gap := _gap(model, part)) is not None:
        raise SPDError(f"{named}, and its text part as a {type(part).__name__} does not say the same: {gap}; {instead}")
    part.generation_config = copy.deepcopy(model.generation_config)
    part.name_or_path = part.config._name_or_path = model.name_or_path
    return part


def auto_class(config: Any) -> Any:
    """Which of transformers' classes reads a checkpoint with this configuration."""
    causal, several = (is_known_to(auto, config) for auto in (AutoModelForCausalLM, AutoModelForImageTextToText))
    return AutoModelForImageTextToText if several and not causal else AutoModelForCausalLM


def _language_model(model: PreTrainedModel, text: Any) -> PreTrainedModel | None:
    """A causal language model of the text's configuration around the very modules or weights of the whole model."""
    text = copy.deepcopy(text)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    text.tie_word_embeddings = head is not None and head.weight is embedding.weight
    text.dtype = model.dtype
    if text.model_type in _SAME_ON_TEXT:
        return _renamed(model.get_decoder(), head, text)
    kind = causal_class(text)
    if kind is None or head is None:
        return None
    whole = [module for module in model.modules() if type(module) is kind]
    if whole:
        return whole[0]
    with torch.device("meta"):
        part = kind(text)
    decoder = model.get_decoder()
    if type(decoder) is not type(part.base_model):
        return None
    setattr(part, part.base_model_prefix, decoder)
    part.set_output_embeddings(head)
    return None if any(p.is_meta for p in (*part.parameters(), *part.buffers())) else part


def _renamed(decoder: nn.Module, head: nn.Module, text: Any) -> PreTrainedModel:
    """The same weights in a model of another class."""
    settings = text.to_dict()
    settings["rope_parameters"] = {
        key: value for key, value in settings["rope_parameters"].items() if "mrope" not in key
    } | {"rope_type": "default"}  # fmt: skip
    config = AutoConfig.for_model(_SAME_ON_TEXT[settings.pop("model_type")], **settings)
    call_attention(config, attention_implementation(text))
    with torch.device("meta"):
        part = AutoModelForCausalLM.from_config(config)
    state = {f"model.{key}": weight for key, weight in decoder.state_dict().items()}
    part.load_state_dict({**state, "lm_head.weight": head.weight}, assign=True)
    rotary = part.model.rotary_emb
    part.model.rotary_emb = type(rotary)(config).to(part.device)
    return part


@torch.no_grad()
def _gap(model: PreTrainedModel, part: PreTrainedModel) -> str | None:
    """How two models differ on tokens from the middle of the vocabulary, where no token marks an image; None if not."""
    first = part.config.vocab_size // 2
    tokens = (first + torch.arange(_N_TOKENS)[None] * 7 % max(first // 2, 1)).to(model.device)
    mask = torch.ones_like(tokens)
    try:
        with neutral(model):
            both = [run_twin(one, tokens, attention_mask=mask, use_cache=False).logits[0] for one in (model, part)]
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        return f"it cannot be run on text alone ({one_line(error, 100)})"
    found = Parity.between(*(logits.cpu().double() for logits in both))
    return None if found.within(part.dtype) else found.against(part.dtype)
