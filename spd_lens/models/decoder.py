"""Whether this is a model that spd_lens works on: decided when a pair is made, so that nothing finds it out later."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from spd_lens.errors import SPDError, one_line
from spd_lens.models.architectures import architecture, context_length
from spd_lens.models.fingerprint import Fingerprint
from spd_lens.models.hooks import unembed_only
from spd_lens.models.parity import CHECK_TEXTS, TOLERANCE, Parity
from spd_lens.models.tokenizer import text_ids
from spd_lens.models.twin import run_twin, runnable


def check_decoder(twin: PreTrainedModel) -> None:
    """Refuse a model that lacks what the library reads.

    Raises:
        SPDError: it has an encoder beside its decoder, or no head that predicts the next token; its configuration does
            not name layers, widths, heads and context; or it has no keys and values to project.
    """
    name = type(twin).__name__
    config: Any = twin.config
    refuse_encoder(config, name)
    if getattr(twin.get_output_embeddings(), "weight", None) is None:
        raise SPDError(
            f"{name} has no head that predicts the next token; load the model with AutoModelForCausalLM or "
            "spd_lens.load"
        )
    architecture(twin)
    try:
        n_layers = Fingerprint.of(twin).n_layers
        length = context_length(config)
    except SPDError:
        raise
    except Exception as error:  # configurations raise many types on what they lack, or have by layer
        raise SPDError(
            f"the configuration of {name} does not say how its layers split into heads of one width "
            f"({one_line(error, 150)}); choose another model"
        ) from error
    if n_layers < 1:
        raise SPDError(f"the configuration of {name} says num_hidden_layers = {n_layers}; get a complete copy")
    if length is None:
        raise SPDError(
            f"the configuration of {name} does not say how long a text may be (max_position_embeddings); set it to "
            "what the model was trained with, in config.json or as model.config.max_position_embeddings = 2048"
        )


def refuse_encoder(config: Any, name: str) -> None:
    """Refuse a configuration with an encoder beside its decoder."""
    if config.is_encoder_decoder:
        raise SPDError(
            f"{name} reads its prompt with an encoder; spd_lens projects the keys and values of decoders alone, in "
            "which prompt and completion are one text; choose a causal language model"
        )


@torch.no_grad()
def check_causal(twin: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse a model whose predictions depend on what follows, or that makes its logits elsewhere than in its head.

    Raises:
        SPDError: it is so, or the model cannot be run.
    """
    ids = text_ids(tokenizer, CHECK_TEXTS[0])[: context_length(twin.config)]
    half = max(1, len(ids) // 2)
    tokens = torch.tensor([ids, ids[:half] + ids[: len(ids) - half]], device=twin.device)
    row, position = torch.tensor([[0, 1], [half - 1, half - 1]], device=twin.device)
    with runnable(twin, ""):
        whole = run_twin(twin, tokens, use_cache=False).logits[:, half - 1].double()
        with unembed_only(twin.get_output_embeddings(), row, position):
            picked = run_twin(twin, tokens, use_cache=False).logits[0].double()
    allowed = TOLERANCE[twin.dtype]
    if not Parity.between(whole[0], whole[1]).within(allowed):
        raise SPDError(
            f"what {type(twin).__name__} predicts depends on the text behind it, so it is no causal language model "
            "(of a BERT, is_decoder=True in its configuration makes one); choose another model"
        )
    if picked.shape != whole.shape or not Parity.between(whole, picked).within(allowed):
        raise SPDError(
            f"{type(twin).__name__} makes its logits in another way than by its output embeddings, position by "
            "position; choose another model"
        )
