"""`ModelPair`: the lens model to look with, its Hugging Face twin to run and train, one tokenizer, one truth."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.models import adapters, parity, processed
from spd_lens.models.architectures import angles_change_beyond, context_length, is_known
from spd_lens.models.backends import NoLens, choose_backends
from spd_lens.models.batches import batches_by_length
from spd_lens.models.checkpoint import check_whole
from spd_lens.models.decoder import check_causal, check_decoder
from spd_lens.models.devices import dtype_name
from spd_lens.models.fingerprint import Fingerprint
from spd_lens.models.lens import ProvenLens
from spd_lens.models.multimodal import text_part
from spd_lens.models.neutral import neutral, neutrally
from spd_lens.models.probe import probe
from spd_lens.models.prompts import Encoded, Loss, PromptFormat, SpanRule
from spd_lens.models.tokenizer import text_ids
from spd_lens.models.torch_private import before_compile
from spd_lens.sites import Site, resolve_sites

log = logging.getLogger(__name__)


class ModelPair:
    """A lens model and its Hugging Face twin with the same weights.

    "Hooks to look, fold to run": capture, caches and interactive work happen on `lens`; generation and training on
    `hf`. Make one with `spd_lens.load`.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: Any,
        *,
        name: str = "",
        backend: str = "auto",
        prompt_format: str = "auto",
        system: str | None = None,
        enable_thinking: bool | None = None,
        prompt_date: str | date | None = None,
        add_special_tokens: bool = True,
        span_rule: str = "overlap",
    ) -> None:
        """Make a pair of a transformers model in memory, for instance one that was just edited or fine-tuned.

        Raises:
            SPDError: its weights are quantised, or its embedding is offloaded; it is no causal language model, or
                multimodal with a text part that cannot be had alone; its architecture is not in the table, and its
                heads are not where Llama has them; or its tokenizer makes no prompts of the form asked for.
        """
        hf = before_compile(hf)
        check_whole(hf)
        hf = text_part(hf)
        check_decoder(hf)
        backends = choose_backends(backend)
        format = PromptFormat.choose(
            tokenizer, prompt_format, system, enable_thinking, prompt_date, add_special_tokens=add_special_tokens,
            span_rule=span_rule,
        )  # fmt: skip
        self.hf: PreTrainedModel = hf.eval().requires_grad_(False)
        """The Hugging Face twin. It changes only inside `folded`, `finetune` and `sync(to="twin")`."""
        self.tokenizer = tokenizer
        self.format = replace(format, longest=self.n_ctx)
        """How a prompt becomes tokens: chat template, raw or verbatim; and which tokens a span means."""
        self.name = name or getattr(hf.config, "_name_or_path", "") or type(hf).__name__
        self.asked_backend = backend
        """The backend as it was given: `"auto"` may stand for either."""
        self._lens = ProvenLens(backends, self.hf, tokenizer, self.name)
        for text in parity.CHECK_TEXTS:  # what stands in every text (BOS) comes to light here
            self._check_rows(text_ids(tokenizer, text), f"the text {text[:20]!r}")
        with neutral(self.hf):  # which refuses layers that are compiled and weights made in inference mode
            if not is_known(self.hf):
                probe(self.hf, tokenizer, self.sites())
                check_causal(self.hf, tokenizer)

    def __repr__(self) -> str:
        return f"ModelPair({self.name!r}, {self.backend}, {dtype_name(self.dtype)}, {self.device})"

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The twin, and the lens model where it has been built."""
        return (self.hf,) if self._lens.model is None else (self.hf, self._lens.model)

    @property
    def lens(self) -> Any:
        """The lens model, built on first use and compared with the twin on short texts, and beyond each window and rope
        regime that the configuration names and the context holds: an error if their logits disagree."""
        return self._lens.at(0)

    def lens_at(self, length: int) -> Any:
        """The lens model, compared with the twin on texts of that many tokens too. `backend="auto"` goes on to the
        bridge where a HookedTransformer does not agree; an error where none does."""
        return self._lens.at(length)

    def lens_if_any(self, length: int) -> Any | None:
        """The same as `lens_at`, but None where `backend="auto"` finds no lens model that agrees with the twin."""
        try:
            return self.lens_at(length)
        except NoLens:
            if self.asked_backend != "auto":
                raise
            return None

    @property
    def proven_length(self) -> int:
        """Longest text in tokens on which the lens model that is here was compared with the twin; 0 for none."""
        return self._lens.proven

    @property
    def proven_lens(self) -> Any:
        """The lens model to measure on: compared with the twin again if one of them was written to."""
        if not processed.is_as_built(self.lens):
            self._require(self._parity())
        return self.lens

    @property
    def has_lens(self) -> bool:
        """Whether the lens model has been built."""
        return self._lens.model is not None

    def drop_lens(self) -> None:
        """Let go of the lens model's memory; the next use builds it again from the twin."""
        self._lens.drop()

    @property
    def backend(self) -> str:
        """The backend of the lens model, or of the one that would be built next: `"hooked"`, `"bridge"`, or `"none"`
        where all were tried and none agrees with the twin."""
        return "none" if self._lens.found_none else self._lens.backend.name

    @property
    def device(self) -> torch.device:
        """Where the twin is; of one that is spread over several devices, where its embedding is and its logits are."""
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def n_layers(self) -> int:
        return self.hf.config.get_text_config().num_hidden_layers

    @property
    def n_ctx(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        return context_length(self.hf.config) or 0

    def context(self, engine: str) -> int:
        """Longest sequence that an engine takes: a HookedTransformer is sometimes built for less than the twin, and
        `backend="auto"` then takes another lens model."""
        if engine == "twin" or self.asked_backend == "auto":
            return self.n_ctx
        return min(self.n_ctx, self.lens.cfg.n_ctx)

    @property
    def kept_by_layer(self) -> int:
        """Bytes that one layer keeps per token for a backward pass, at most: about 34 values per unit of `d_model`
        (Korthikanti et al. 2022, section 4)."""
        return 34 * self.fingerprint.d_model * self.dtype.itemsize

    @property
    def pad_id(self) -> int:
        """The token that pads shorter rows: the tokenizer's padding or EOS if it is in the embedding, else 0.

        Padding is masked, or stands behind all that is looked at: it only has to be a row of the embedding.
        """
        own = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((id for id in own if id is not None and 0 <= id < self._n_rows), 0)

    @property
    def _n_rows(self) -> int:
        return self.hf.get_input_embeddings().weight.shape[0]

    def dated(self, day: str | None) -> ModelPair:
        """The same models with prompts of a recorded day. The pair itself where its prompts show no date, that day, or
        one that was asked for."""
        return self._formatted(self.format.on(day))

    def with_span_rule(self, rule: SpanRule) -> ModelPair:
        """The same models with another rule for the tokens that a span means; the pair itself where it is its own."""
        return self._formatted(replace(self.format, span_rule=rule))

    def _formatted(self, format: PromptFormat) -> ModelPair:
        if format == self.format:
            return self
        other = copy.copy(self)
        other.format = format
        return other

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint.of(self.hf)

    def sites(
        self, layers: str | int | Iterable[int] = "last_mid", kinds: str | Sequence[str] = ("k", "v")
    ) -> list[Site]:
        """The sites of some layers and kinds of this model."""
        return resolve_sites(layers, kinds, self.n_layers)

    def encode(
        self, example: Example, loss: Loss = "aligned", engine: str = "twin", max_tokens: int | None = None
    ) -> Encoded:
        """Token ids, completion start and scored positions of an example; refused beyond the engine's context.

        `max_tokens` cuts the text behind that many tokens; None keeps all.
        """
        encoded = self.format.encode(example, loss, max_tokens)
        self._check_ids(encoded.ids, example, self.context(engine))
        return encoded

    def batches(self, encoded: Sequence[Encoded], batch_tokens: int) -> list[list[int]]:
        """Which texts share a pass, by their indices: see `batches_by_length`."""
        return batches_by_length([len(e.ids) for e in encoded], batch_tokens, angles_change_beyond(self.hf.config))

    def prompt_ids(self, example: Example, most: int | None = None) -> list[int]:
        """Token ids of an example's prompt, at most the first `most` (None: all).

        Refused if there are none, or they leave no room in the context.
        """
        ids = self.format.prompt_ids(example.prompt, most)
        if not ids:
            raise SPDError(f"prompt {example.id!r} is empty: it has no token to continue from; write something")
        self._check_ids([*ids, 0], example, self.n_ctx)
        return ids

    def _check_rows(self, ids: list[int], what: str) -> None:
        if ids and max(ids) >= self._n_rows:
            raise SPDError(
                f"{what} has the token {self.tokenizer.convert_ids_to_tokens(max(ids))!r} ({max(ids)}), but the "
                f"embedding of {self.name} has {self._n_rows} rows: the tokenizer is not "
                "this model's, or the embedding was not resized for new tokens"
            )

    def _check_ids(self, ids: list[int], example: Example, limit: int) -> None:
        self._check_rows(ids, example.name)
        if len(ids) > limit:
            lens = "'s lens model; take engine='twin'," if limit < self.n_ctx else ";"
            raise SPDError(
                f"{example.name} has {len(ids)} tokens, more than the context of "
                f"{limit} tokens of {self.name}{lens} shorten it or leave it out (--too-long drop does, and counts)"
            )

    @neutrally
    def sync(self, to: str, adapter: str | Path | None = None) -> parity.Parity:
        """Bring weights from one model to the other, and prove that they arrived.

        `to="lens"`: the twin's weights, with the adapter merged in float32, into the lens model. Without an adapter
        this gives back the twin's own bits. `to="twin"`: an edited lens model's weights into the twin.

        Returns:
            How far the lens model is from the twin carrying the *unmerged* adapter.

        Raises:
            SPDError: they disagree, or rounding to the lens model's dtype swallowed the adapter. The lens model then
                has the twin's weights without adapter; in the other direction the twin has its earlier weights.
        """
        if to == "lens":
            return self._sync_to_lens(adapter)
        if to == "twin":
            if adapter is not None:
                raise SPDError("sync(to='twin') takes no adapter: the twin receives the lens model's own weights")
            return self._sync_to_twin()
        raise SPDError(f"sync goes to 'lens' or to 'twin', not to {to!r}")

    @neutrally
    def check(self) -> parity.Parity:
        """Compare lens model and twin on short texts; an error if they disagree beyond their dtype's tolerance."""
        result = self._parity()
        if result.shifted(self.dtype):
            raise SPDError(
                f"the lens model of {self.name} predicts what its twin does (KL {result.kl:.2g} nats), but its logits "
                f"are others by {result.logits:.2g} of their spread: {processed.INSTEAD}"
            )
        self._require(result)
        return result

    @neutrally
    def _parity(self) -> parity.Parity:
        processed.refuse_processed(self.lens, self.sites("all"))
        return parity.Parity.between(self.check_logits(self.hf), self.check_logits(self.lens))

    def _require(self, result: parity.Parity) -> None:
        if not result.shifted(self.dtype) and not result.within(self.dtype):
            raise SPDError(
                f"lens model and twin of {self.name} disagree: {result.against(self.dtype)}; bring them together with "
                "pair.sync(to='lens') or pair.sync(to='twin')"
            )
        processed.remember(self.lens, self.hf)

    def _sync_to_lens(self, adapter: str | Path | None) -> parity.Parity:
        lens = self.lens
        if processed.is_processed(lens):
            raise SPDError(f"the lens model of {self.name} cannot take the twin's weights: {processed.INSTEAD}")
        if adapter is None:
            self._lens.backend.write(lens, self.hf)
            return self.check()
        base = self.check_logits(self.hf)
        with adapters.adapted(self.hf, adapter) as tuned:
            target = self.check_logits(tuned)
        merged = adapters.merged_copy(self.hf, adapter)
        remedy = (
            "give the adapter's directory to spd_lens.load instead"
            if self.dtype == torch.float32
            else "load the pair with dtype='float32'"
        )
        try:
            self._lens.backend.write(lens, merged)
            result = parity.Parity.between(target, self.check_logits(lens))
            effect = parity.Parity.between(target, base)
            # Merged twin and lens agree even when rounding swallowed the adapter; the unmerged adapter tells.
            swallowed = effect.kl > 0 and result.kl > effect.kl / 2
            if swallowed or not result.within(self.dtype):
                raise SPDError(
                    f"the adapter in {adapter} did not reach the lens model: its effect is a KL of {effect.kl:.2g} "
                    f"nats, but in {dtype_name(self.dtype)} the lens model stays {result.kl:.2g} nats away from "
                    f"the adapted twin; {remedy} (the lens model has the twin's weights again)"
                )
        except BaseException:
            self._lens.backend.write(lens, self.hf)
            raise
        processed.remember(lens, self.hf)
        return result

    def _sync_to_twin(self) -> parity.Parity:
        weights = self._lens.backend.read(self.lens, self.hf)
        saved = {name: parameter.detach().clone() for name, parameter in self.hf.named_parameters()}
        _assign(self.hf, weights)
        try:
            return self.check()
        except SPDError:
            _assign(self.hf, saved)
            raise

    def check_logits(self, model: nn.Module) -> torch.Tensor:
        """Logits of the twin or the lens model on two short texts, in float64 on the CPU."""
        return self._lens.check_logits(model)


def _assign(twin: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in weights and not torch.equal(parameter, weights[name].to(parameter)):  # else it stays shared
                parameter.copy_(weights[name])
