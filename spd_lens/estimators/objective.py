"""`Objective`: what a projection does to calibration examples, differentiable in the directions that it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_lens.examples import Example
from spd_lens.models import (
    Encoded,
    ModelPair,
    fast_products,
    fastest_attention,
    right_pad,
    run_twin,
    token_losses,
    unembed_only,
)
from spd_lens.subspaces import Subspace, projected_twin

_COMPARED = 16
"""Tokens of each completion at which KL is taken, evenly spread: a row of the vocabulary is kept for each of them."""
_BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Effect:
    """What a subspace does to examples, in nats, as means over them."""

    loss: float
    """Mean of `-log p` over `S` (Eq. 6)."""
    kl: float
    """Mean over up to 16 tokens of the completion of KL(base ‖ projected)."""
    value: float
    """`loss + kl_weight · kl`."""

    @property
    def recorded(self) -> dict[str, float]:
        return {"loss": self.loss, "kl": self.kl}


class Objective:
    """`loss + kl_weight · KL(base ‖ projected)` of worked examples; to be used inside `neutral`."""

    def __init__(self, pair: ModelPair, examples: Sequence[Example], how: Mapping[str, Any], kl_weight: float) -> None:
        """`how`: the settings of the moments, which say what is scored and where a text is cut."""
        self.pair, self.kl_weight = pair, kl_weight
        most = how.get("max_calibration_tokens")
        self.encoded = [pair.encode(example, how["loss"], max_tokens=most) for example in examples]
        self.compared = [_spread(text) for text in self.encoded]
        self.base: dict[int, Float[Tensor, "token d_vocab"]] = {}
        """Log-probabilities of the model as it is at the compared tokens of each example."""
        with torch.no_grad():
            for batch in self.batches(range(len(self))):
                logits = self._logits(pair.hf, batch, [self.compared[i] for i in batch])
                self.base |= {i: own.log_softmax(dim=-1) for i, own in zip(batch, logits, strict=True)}

    def __len__(self) -> int:
        return len(self.encoded)

    def batches(self, chosen: Sequence[int]) -> list[list[int]]:
        """Which of the chosen examples share a pass."""
        batches = self.pair.batches([self.encoded[i] for i in chosen], _BATCH_TOKENS)
        return [[chosen[i] for i in batch] for batch in batches]

    def of(
        self, batch: Sequence[int], subspace: Subspace
    ) -> tuple[Float[Tensor, " example"], Float[Tensor, " example"]]:
        """Aligned loss and KL of each example of one pass; the bases of the subspace may require gradients."""
        scored = [self.encoded[i].scored for i in batch]
        wanted = [own + self.compared[i] for own, i in zip(scored, batch, strict=True)]
        with projected_twin(self.pair.hf, subspace) as model:
            logits = self._logits(model, batch, wanted)
        losses, kls = [], []
        for i, own, rows in zip(batch, scored, logits, strict=True):
            targets = torch.tensor([self.encoded[i].ids[t] for t in own], device=rows.device)
            losses.append(token_losses(rows[: len(own)], targets).mean())
            log_p, log_q = self.base[i], rows[len(own) :].log_softmax(dim=-1)
            kls.append((log_p.exp() * (log_p - log_q)).sum().double() / max(1, len(log_p)))
        return torch.stack(losses), torch.stack(kls)

    @torch.no_grad()
    def effect(self, subspace: Subspace) -> Effect:
        """Means over all examples."""
        parts = [self.of(batch, subspace) for batch in self.batches(range(len(self)))]
        loss, kl = (torch.cat(own).mean().item() for own in zip(*parts, strict=True))
        return Effect(loss, kl, loss + self.kl_weight * kl)

    def _logits(
        self, model: nn.Module, batch: Sequence[int], wanted: Sequence[Sequence[int]]
    ) -> tuple[Float[Tensor, "token d_vocab"], ...]:
        """Float32 logits that predict the wanted tokens of each example."""
        tokens, _ = right_pad([self.encoded[i].ids for i in batch], self.pair.pad_id, self.pair.device)
        row = torch.tensor([n for n, own in enumerate(wanted) for _ in own], device=tokens.device)
        position = torch.tensor([t - 1 for own in wanted for t in own], device=tokens.device)
        head = self.pair.hf.get_output_embeddings()
        # no mask: padding on the right is behind all that a real token attends to
        with (
            fast_products(self.pair.device, self.pair.dtype),
            fastest_attention(model, tokens.shape[1]),
            unembed_only(head, row, position),
        ):
            logits = run_twin(model, tokens, use_cache=False).logits[0].float()
        return logits.split([len(own) for own in wanted])


def _spread(text: Encoded) -> list[int]:
    start, n = text.completion_start, len(text.ids) - text.completion_start
    return [start + i * n // min(n, _COMPARED) for i in range(min(n, _COMPARED))]
