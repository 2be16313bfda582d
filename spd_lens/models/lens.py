"""`ProvenLens`: a pair's lens model, built when needed and compared with the twin at the lengths that are used."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spd_lens.errors import SPDError
from spd_lens.models import parity
from spd_lens.models.architectures import context_length
from spd_lens.models.backends import Backend, NoLens, lens_logits
from spd_lens.models.batches import right_pad
from spd_lens.models.device_map import is_spread
from spd_lens.models.devices import dtype_name, free_memory, out_of_memory
from spd_lens.models.neutral import neutral
from spd_lens.models.processed import remember
from spd_lens.models.proof import beyond, parity_at, regimes, rows_that_fit
from spd_lens.models.tokenizer import text_ids
from spd_lens.models.twin import in_float32, run_twin

log = logging.getLogger(__name__)


class ProvenLens:
    """The lens model of a twin, from the first of some backends that agrees with the twin at every length asked for."""

    def __init__(self, backends: Sequence[Backend], twin: PreTrainedModel, tokenizer: Any, name: str) -> None:
        self.model: Any = None
        self.proven = 0
        """Longest text in tokens on which the model that is here was compared with the twin."""
        self._backends = list(backends)
        self._twin, self._tokenizer, self._name = twin, tokenizer, name
        self.found_none = False
        """Whether every backend was tried and none takes the model and agrees with the twin."""

    @property
    def backend(self) -> Backend:
        """The backend of the model that is here, or that would be built next."""
        return self._backends[0]

    def drop(self) -> None:
        """Let go of the model."""
        self.model, self.proven = None, 0

    def at(self, length: int) -> Any:
        """The lens model, compared with the twin on a text of `length` tokens or longer.

        Raises:
            NoLens: no backend takes the model and agrees with the twin at that length, or the twin is on several
                devices.
        """
        if self.model is not None and length <= self.proven:
            return self.model
        if is_spread(self._twin):
            self.found_none = True
            raise NoLens(
                f"{self._name} is spread over several devices, and a lens model needs a second copy of all weights on "
                "one of them",
                "take engine='twin', or load the model without device_map",
            )
        with neutral(self._twin, *([] if self.model is None else [self.model])):
            return self._first_that_agrees(length)

    def _first_that_agrees(self, length: int) -> Any:
        while True:
            try:
                if self.model is None:
                    self._build()
                if length > self.proven:
                    self._prove(length)
                    self.proven = length
            except NoLens as error:
                if len(self._backends) == 1:
                    self.found_none = self.model is None
                    raise
                self.drop()
                self._backends.pop(0)
                log.warning("%s: the lens model is a %s", error.reason, self.backend.lens_class)
            else:
                self.found_none = False
                return self.model

    def check_logits(self, model: nn.Module) -> torch.Tensor:
        """Logits of either model on the short check texts, without those of padding; in float64 on the CPU."""
        with neutral(model), torch.no_grad():
            rows = [text_ids(self._tokenizer, text) for text in parity.CHECK_TEXTS]
            tokens, mask = right_pad(rows, rows[0][0], self._twin.device)  # padding is masked
            if hasattr(model, "hook_dict"):
                logits = lens_logits(model, tokens, mask)
            else:
                logits = run_twin(model, tokens, attention_mask=mask, use_cache=False).logits
            return logits[mask.bool()].cpu().double()

    def _build(self) -> None:
        with self._explained():
            self.model = self.backend.build(self._twin, self._tokenizer)
        try:
            self._require(self._short(self._twin, self.model), "on short texts")
            self._prove_conversion()
            remember(self.model, self._twin)
        except Exception:
            self.drop()
            raise

    def _prove_conversion(self) -> None:
        """Compare on texts just beyond each length in the context from which on settings say that something changes.

        In half precision rounding hides more than a window or a rope scaling does: both models are widened to float32.
        """
        twin, lens, allowed = self._twin, self.model, parity.TOLERANCE[self._twin.dtype]
        if twin.dtype in (torch.bfloat16, torch.float16):
            if 2 * sum(p.numel() for p in twin.parameters()) * 4 > free_memory(twin.device):
                log.warning("there is no memory to compare lens model and twin of %s in float32", self._name)
            else:
                twin, allowed = in_float32(twin), parity.WIDENED
                with self._explained():
                    lens = self.backend.build(twin, self._tokenizer)
                self._require(self._short(twin, lens), "on short texts in float32", allowed)
        limit = min(context_length(twin.config) or 0, lens.cfg.n_ctx)
        for begins, setting in regimes(twin.config.get_text_config()).items():
            length = beyond(begins, limit)
            if begins >= limit or length <= self.proven:
                continue
            if not rows_that_fit(twin, length):
                log.warning(
                    "there is no memory to compare lens model and twin of %s beyond %s = %d now: a text of more tokens "
                    "is compared before it is used", self._name, setting, begins,
                )  # fmt: skip
                return
            where = f"on texts of {length} tokens, beyond {setting} {begins}"
            self._require(self._long(twin, lens, length), where, allowed)
            self.proven = length

    def _prove(self, length: int) -> None:
        if length > self.model.cfg.n_ctx:
            raise NoLens(
                f"the {self.backend.lens_class} of {self._name} takes {self.model.cfg.n_ctx} tokens, not {length}",
                "take engine='twin', or shorten the text or leave it out (--too-long drop does, and counts)",
            )
        where = f"on texts of {length} tokens"
        found = self._long(self._twin, self.model, length)
        edited = not found.within(self._twin.dtype) and not self._short(self._twin, self.model).within(self._twin.dtype)
        if not edited:
            self._require(found, where)
            return
        # an edit or a merged adapter: the question is then whether the conversion of the twin holds
        with self._explained():
            own = self.backend.build(self._twin, self._tokenizer)
        try:
            self._require(self._long(self._twin, own, length), where)
        except NoLens as error:
            raise SPDError(f"{error} (the lens model with its own weights is kept)") from error

    def _short(self, twin: nn.Module, lens: nn.Module) -> parity.Parity:
        with self._explained():
            return parity.Parity.between(self.check_logits(twin), self.check_logits(lens))

    def _long(self, twin: PreTrainedModel, lens: nn.Module, length: int) -> parity.Parity:
        with self._explained():
            return parity_at(twin, lens, self._tokenizer, length)

    def _require(self, found: parity.Parity, where: str, allowed: parity.Tolerance | None = None) -> None:
        if not found.within(allowed or self._twin.dtype):
            raise NoLens(
                f"lens model and twin of {self._name} disagree {where} ({self.backend.lens_class}): "
                f"{found.against(allowed or self._twin.dtype)}",
                f"{self.backend.instead}, or dtype='float32'",
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """TransformerLens raises errors of many types on a model that it does not know."""
        try:
            yield
        except SPDError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
            raise NoLens(
                f"transformer-lens cannot run {type(self._twin).__name__} in {dtype_name(self._twin.dtype)} with "
                f"backend {self.backend.name!r} ({reason})",
                f"{self.backend.instead}, or dtype='float32'",
            ) from error
