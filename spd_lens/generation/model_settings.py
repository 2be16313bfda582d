"""What a model's own generation config asks for beside temperature, top-p and top-k, with the meaning of transformers.

`generate` of transformers takes from it every setting that its caller leaves out: a repetition penalty, tokens that are
never drawn, strings that end a completion. Here the same processors are made in the same way, for one completion at
a time: no padding, no neighbour and no interruption has a part in what they see.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig, StopStringCriteria

from spd_lens.errors import SPDError, one_line, shortened
from spd_lens.generation.corpus import NOT_APPLIED
from spd_lens.generation.sampling import Sampling
from spd_lens.models import ModelPair, default_generation_settings, logits_processors

log = logging.getLogger(__name__)

Processor = Callable[[Tensor, Tensor], Tensor]
"""From a row's ids so far `[1, pos]` and the next token's logits `[1, d_vocab]` to the logits that count."""

APPLIED = "generation_config"
"""Name of what is applied, beside `NOT_APPLIED`, in the settings of a corpus, an evaluation and a run."""

_PROCESSORS = tuple(
    """sequence_bias encoder_repetition_penalty repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids min_length min_new_tokens forced_bos_token_id exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens watermarking_config""".split()
)
_CUTOFFS = ("top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings that change nothing where decoding is greedy."""
_AFTER_SAMPLING = (*_CUTOFFS, "watermarking_config")
"""Processors between or behind temperature, top-k and top-p: with one of them, transformers does these too."""
_ELSEWHERE = {
    "temperature", "top_p", "top_k",  # of `Sampling`
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",  # of `stop_tokens`, or of no concern
    "use_cache", "renormalize_logits", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "transformers_version",
}  # fmt: skip
"""Settings that are not reported, since they are applied elsewhere or no token depends on them."""
_SUPERSEDED = {
    "max_length", "max_new_tokens", "num_return_sequences",  # arguments of ours
    "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size",
    "low_memory", "use_mtp", "speculation_type", "prompt_lookup_num_tokens", "max_matching_ngram_size", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "early_stopping", "length_penalty", "diversity_penalty",
}  # fmt: skip
"""Settings that are not applied and need no warning: arguments here, about speed, or about beams alone."""
_NEUTRAL = {"min_p": 0, "guidance_scale": 1, "penalty_alpha": 0}
"""Values that change nothing, beside transformers' defaults."""


@dataclass(frozen=True)
class ModelSettings:
    """What the generation config asks for, sorted into what is applied and what is not."""

    applied: Mapping[str, Any] = field(default_factory=dict)
    not_applied: Mapping[str, Any] = field(default_factory=dict)
    sampling: Sampling | None = None
    """How tokens are drawn behind the processors; None: as the caller's `Sampling` says."""
    make: Callable[[Sequence[int]], Processor] | None = None
    """A prompt's processor; None where nothing changes logits."""
    stops: StopStringCriteria | None = None

    @classmethod
    def of(cls, pair: ModelPair, sampling: Sampling, stop_ids: Sequence[int]) -> ModelSettings:
        """The settings of a pair's twin, whose generation config is read and never written.

        Args:
            pair: The model pair.
            sampling: How tokens are drawn; where it is greedy, cut-offs of the distribution change nothing.
            stop_ids: Tokens that end a completion, and must not do so before `min_new_tokens`.

        Raises:
            SPDError: transformers does not take a value.
        """
        own = pair.hf.generation_config
        asked = _asked(own)
        if sampling.greedy:
            asked = {name: value for name, value in asked.items() if name not in (*_CUTOFFS, "do_sample")}
        names = [name for name in (*_PROCESSORS, *_CUTOFFS) if name in asked]
        whole = not sampling.greedy and any(name in _AFTER_SAMPLING for name in names)
        config: dict[str, Any] = {name: getattr(own, name) for name in names}
        if whole:
            config |= {"do_sample": True, **sampling.to_dict(), "top_k": sampling.top_k or 0}
        applied = {name: asked[name] for name in (*names, "stop_strings") if name in asked}
        try:
            found = cls(
                applied,
                {name: value for name, value in asked.items() if name not in applied},
                Sampling(1.0, 1.0, None) if whole else None,
                (lambda prompt_ids: logits_processors(pair.hf, config, prompt_ids, stop_ids)) if names else None,
                StopStringCriteria(pair.tokenizer, own.stop_strings) if "stop_strings" in asked else None,
            )
            if found.make is not None:  # once, since some values are looked at in the first step
                logits = torch.zeros(1, pair.hf.get_output_embeddings().weight.shape[0], device=pair.device)
                found.make([0, 0])(torch.zeros(1, 2, dtype=torch.long, device=pair.device), logits)
        except (ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
            raise SPDError(
                f"the model's generation config cannot be applied ({one_line(error)}): it sets {shown(applied)}; "
                "correct it in generation_config.json, or in pair.hf.generation_config"
            ) from error
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """What the settings of an artefact record: nothing where the generation config asks for nothing."""
        both = {APPLIED: dict(self.applied), NOT_APPLIED: dict(self.not_applied)}
        return {name: values for name, values in both.items() if values}

    def tell(self) -> None:
        """Log one sentence if there is anything to say: a warning where transformers would write another text."""
        both = {"applied": self.applied, "not applied": self.not_applied}
        if parts := [f"{shown(values)} ({done})" for done, values in both.items() if values]:
            level = logging.WARNING if self.not_applied.keys() - _SUPERSEDED else logging.INFO
            log.log(level, "the model's generation config sets %s", "; ".join(parts))

    def stopped(self, prompt_ids: list[int], new_ids: list[int]) -> bool:
        """Whether the last token completes one of the stop strings, which may have begun in the prompt."""
        if self.stops is None:
            return False
        n = self.stops.maximum_token_len  # it looks no further back
        return bool(self.stops(torch.tensor([(prompt_ids[-n:] + new_ids)[-n:]]), None))

    def processed(
        self, logits: Float[Tensor, "row d_vocab"], rows: Sequence[tuple[Processor, Sequence[int]]]
    ) -> Float[Tensor, "row d_vocab"]:
        """Each row's logits through its processor, which is given all of the row's ids.

        Raises:
            SPDError: no token is left to choose.
        """
        own = logits.clone()  # a processor may write in place
        left = torch.cat(
            [process(torch.tensor([ids], device=own.device), own[i : i + 1]) for i, (process, ids) in enumerate(rows)]
        )
        if (left.amax(dim=-1) == -torch.inf).any():
            raise SPDError(
                f"the model's generation config leaves no token to choose: it sets {shown(self.applied)}; "
                "correct it in generation_config.json, or in pair.hf.generation_config"
            )
        return left


def _asked(own: Any) -> dict[str, Any]:
    """What a generation config sets and transformers does not set anyway, as JSON has it."""
    neutral = {**default_generation_settings(), **_NEUTRAL}
    asked = {}
    for name in vars(GenerationConfig()):
        if name.startswith("_") or name in _ELSEWHERE:
            continue
        value = _plain(getattr(own, name, None))
        if name == "do_sample":
            is_set = value is False
        else:
            is_set = value is not None and value is not False and value not in ([], {}, "", neutral.get(name))
        if is_set:
            asked[name] = value
    return asked


def _plain(value: Any) -> Any:
    """A value as it is read back from JSON."""
    for way in ("to_dict", "tolist"):
        value = getattr(value, way)() if hasattr(value, way) else value
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):  # biases by sequence of ids
        value = [[key, bias] for key, bias in value.items()]
    return json.loads(json.dumps(value, default=str))


def shown(values: Mapping[str, Any]) -> str:
    """Names and values in a sentence, long values cut."""
    return ", ".join(f"{name} = {shortened(json.dumps(value, ensure_ascii=False))}" for name, value in values.items())
