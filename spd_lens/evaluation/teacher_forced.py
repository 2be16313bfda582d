"""Teacher-forced effects: what a policy does to the loss and the distribution on gold completions.

Accuracy on a few hundred items cannot tell small effects apart; these measures can, and they are paired per item.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import with_config
from torch import Tensor, nn

from spd_lens.errors import SPDError, whole
from spd_lens.evaluation.skip_layers import Prefix, exact_starts
from spd_lens.examples import Example, worked_examples
from spd_lens.files import STRICT, Loss
from spd_lens.models import (
    Encoded,
    ModelPair,
    fast_products,
    neutrally,
    right_pad,
    run_twin,
    unembed_only,
    weights_digest,
)
from spd_lens.output import progress_bar
from spd_lens.subspaces import Policy

_ROWS = 32
"""How many rows of logits are compared at a time."""
_KEPT = 2**28
"""Bytes of hidden states that are kept for batches that come again: those of 100,000 tokens of SmolLM2-135M."""


@with_config(STRICT)
@dataclass(frozen=True)
class ForcedItem:
    """One gold completion under one policy. Losses and KL are in nats, each a mean over tokens."""

    id: str
    aligned_loss: Loss
    """Mean of `-log p` over the tokens of `S` (Eq. 6)."""
    completion_loss: Loss
    """Mean of `-log p` over all tokens of the completion."""
    kl: Loss
    """Mean over the completion's tokens of KL(base || policy)."""
    token_accuracy: float
    """Share of the completion's tokens that are the policy's most probable next token."""
    results_loss: Loss | None = None
    """Mean of `-log p` over the tokens of each value where it is computed; None where the task marks none."""
    copies_loss: Loss | None = None
    """Mean of `-log p` over the answer's tokens whose value stands earlier in the completion; None where none does."""
    rest_loss: Loss | None = None
    """Mean of `-log p` over the completion's tokens that are neither; None where nothing is marked."""
    answer_only_loss: Loss | None = None
    """Mean of `-log p` over the answer's tokens where it is asked for without reasoning; None where it cannot be."""

    def __post_init__(self) -> None:
        if any(value is not None and math.isnan(value) for name, value in vars(self).items() if name != "id"):
            raise SPDError(
                f"what the model says of item {self.id!r} is no number; use dtype='float32', or keep more directions"
            )

    def to_dict(self) -> dict[str, Any]:
        """Its fields for JSON, without losses that it does not have."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def per_item(group: Mapping[str, Sequence[ForcedItem]], measure: str) -> list[float]:
    """A value of each item that has one, averaged over the policies of a group: items are the units, not policies."""
    rows = zip(*group.values(), strict=True)
    return [fmean(getattr(item, measure) for item in items) for items in rows if getattr(items[0], measure) is not None]


@dataclass(frozen=True)
class ForcedBatch:
    """Right-padded rows, and the positions that predict completion tokens, and scored tokens of the prompt."""

    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    row: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    target: Int[Tensor, " n"]
    scored: list[list[int]]
    """For each row, which of the `n` predictions are of a token in `S`."""
    in_completion: Bool[Tensor, " n"]
    """Which of the predictions are of a token of the completion."""
    marked: list[dict[str, list[int]]]
    """For each row, by the name of a mark, which of the predictions are of a token in it (`Encoded.marked`)."""

    @classmethod
    def of(cls, encoded: Sequence[Encoded], pair: ModelPair) -> ForcedBatch:
        tokens, mask = right_pad([e.ids for e in encoded], pair.pad_id, pair.device)
        places = [
            (i, t) for i, e in enumerate(encoded) for t in sorted({*e.scored, *range(e.completion_start, len(e.ids))})
        ]
        index = {place: n for n, place in enumerate(places)}
        row, target = torch.tensor(places, device=pair.device).T
        scored = [[index[i, t] for t in e.scored] for i, e in enumerate(encoded)]
        starts = torch.tensor([e.completion_start for e in encoded], device=pair.device)
        marked = [{name: [index[i, t] for t in at] for name, at in e.marked.items()} for i, e in enumerate(encoded)]
        return cls(tokens, mask, row, target - 1, tokens[row, target], scored, target >= starts[row], marked)

    def of_completion(self, row: int) -> Bool[Tensor, " n"]:
        """Which of the predictions are of a token of the completion in this row."""
        return (self.row == row) & self.in_completion

    def parts(self, row: int) -> dict[str, list[int]]:
        """Which predictions are of the row's results, its copies, and the rest of its completion, by the loss that is
        theirs. A part without tokens is left out, and so is the rest where nothing is marked."""
        found = {f"{name}_loss": self.marked[row].get(name, []) for name in ("results", "copies")}
        if marked := {n for part in found.values() for n in part}:
            found["rest_loss"] = [n for n in self.of_completion(row).nonzero()[:, 0].tolist() if n not in marked]
        return {name: part for name, part in found.items() if part}


class ForcedPasses:
    """Logits on batches of gold completions: of the base model on each batch first, then of policies on the same batch.

    A policy's pass begins at the first layer that it changes, with what the base model's pass left there, wherever that
    gives the bits of a whole pass (`exact_starts`). To be used inside of `neutral` and `torch.no_grad`.

    Args:
        pair: The model.
        layers: Layers at which passes will begin (`Policy.first_layer`); at others they run in full. See `expect`.
        keep: Also keep what the base model computed, up to 256 MiB, for when a batch comes again: then only its logits
            are computed. It is forgotten where the model's weights are seen to have changed (`weights_digest`).
    """

    def __init__(self, pair: ModelPair, layers: Iterable[int] = (), *, keep: bool = False) -> None:
        self.pair, self._end = pair, pair.n_layers if keep else 0
        self._layers: set[int] = set()
        self._prefix = Prefix(pair.hf, ())
        self._kept: dict[bytes, dict[int, Any]] = {}
        self._free = _KEPT
        self._weights = ""
        self._batch: ForcedBatch
        self._begun: dict[int, Any]
        self.expect([*layers, self._end])

    def expect(self, layers: Iterable[int]) -> None:
        """More layers at which passes will begin, from the next batch on."""
        if new := exact_starts(self.pair, layers) - self._layers:
            self._layers |= new
            self._prefix = Prefix(self.pair.hf, self._layers)
        if self._end and (weights := weights_digest(self.pair.hf)) != self._weights:
            self._kept, self._free, self._weights = {}, _KEPT, weights

    def base(self, batch: ForcedBatch) -> Float[Tensor, "n d_vocab"]:
        """Float32 logits of the base model that predict a batch's completion tokens."""
        self._batch = batch
        name = torch.stack([batch.tokens, batch.mask]).cpu().numpy().tobytes() if self._end else b""
        self._begun = self._kept.get(name, {})
        if self._end in self._begun and self._layers <= self._begun.keys():
            with self._prefix.starting_at(self._end, self._begun):
                return forced_logits(self.pair, self.pair.hf, batch)
        self._free += _size(self._kept.pop(name, {}))
        with self._prefix.recording() as self._begun:
            logits = forced_logits(self.pair, self.pair.hf, batch)
        if self._end in self._begun and (size := _size(self._begun)) <= self._free:
            self._kept[name] = self._begun
            self._free -= size
        return logits

    def under(self, policy: Policy) -> Float[Tensor, "n d_vocab"]:
        """The same of a policy, on the batch of the last call of `base`."""
        first = policy.first_layer(self.pair)
        with policy.applied(self.pair) as model, self._prefix.starting_at(first, self._begun):
            return forced_logits(self.pair, model, self._batch)


def _size(begun: Mapping[int, Any]) -> int:
    """Bytes of what blocks returned; those of some architectures return more than a tensor."""
    parts = (part for one in begun.values() for part in (one if isinstance(one, tuple) else (one,)))
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


@neutrally
@torch.no_grad()
def teacher_forced(
    pair: ModelPair,
    examples: Sequence[Example],
    policies: Sequence[Policy],
    *,
    passes: ForcedPasses | None = None,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> dict[str, list[ForcedItem]]:
    """Losses on the parts of the same gold completions, and KL from base, of each policy, in one pass each.

    Layers below the first that a policy changes are run once, for the base (`ForcedPasses`).

    Args:
        pair: The model; the base is its twin as it stands.
        examples: Examples with completion and spans, held out from calibration and training.
        policies: Compared with the base on every batch, so that all see the same padding.
        passes: Those of earlier calls, which may have kept what the base computed on the same batches.
        batch_tokens: Padded tokens per batch. Two float32 rows of the vocabulary per completion token are in memory.
        progress: Whether to show a progress bar.

    Returns:
        For each policy's name, one item per example, in the order of `examples`.
    """
    examples, batch_tokens = worked_examples(examples), whole("batch_tokens", batch_tokens)
    if not examples:
        raise SPDError("there are no items to evaluate; give at least one")
    names = [policy.name for policy in policies]
    if len(set(names)) < len(names):
        raise SPDError(f"policies need names of their own, but these were given: {', '.join(names)}")
    encoded = [pair.encode(example) for example in examples]
    items: dict[str, dict[int, ForcedItem]] = {name: {} for name in names}
    passes = passes or ForcedPasses(pair)
    if passes.pair.hf is not pair.hf:
        raise SPDError(f"the passes are those of {passes.pair.name} as another pair has it; give those of this pair")
    passes.expect(policy.first_layer(pair) for policy in policies if not policy.is_base)
    with progress_bar(progress, total=len(examples) * len(policies), desc="teacher-forced") as bar:
        for indices in pair.batches(encoded, batch_tokens):
            batch = ForcedBatch.of([encoded[i] for i in indices], pair)
            base = passes.base(batch).log_softmax(dim=-1)
            for policy in policies:
                logits = None if policy.is_base else passes.under(policy)
                losses, kl, right = _compare(base, logits, batch.target)
                for i, index in enumerate(indices):
                    mine = batch.of_completion(i)
                    items[policy.name][index] = ForcedItem(
                        id=examples[index].id,
                        aligned_loss=losses[batch.scored[i]].mean().item(),
                        completion_loss=losses[mine].mean().item(),
                        kl=kl[mine].mean().item(),
                        token_accuracy=right[mine].mean().item(),
                        **{name: losses[part].mean().item() for name, part in batch.parts(i).items()},
                    )
                bar.update(len(indices))
    return {name: [found[i] for i in range(len(examples))] for name, found in items.items()}


def _compare(
    base: Float[Tensor, "n d_vocab"],
    logits: Float[Tensor, "n d_vocab"] | None,
    target: Int[Tensor, " n"],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Loss, KL(base || policy) and whether the target is the most probable token, from the base's log-probabilities.

    `logits` None: the policy is the base. A few rows at a time: a vocabulary's worth of temporaries then stays in the
    processor's cache, which on a CPU is several times faster.
    """
    parts = []
    policy = base if logits is None else logits
    for log_p, some, wanted in zip(base.split(_ROWS), policy.split(_ROWS), target.split(_ROWS), strict=True):
        log_q = log_p if logits is None else some.log_softmax(dim=-1)
        # rounding can leave a sum of positive and negative terms a hair below zero
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp_min(0.0)
        loss = -log_q.gather(1, wanted[:, None])[:, 0]
        parts.append((loss, kl, (some.argmax(dim=-1) == wanted).float()))
    losses, kls, right = zip(*parts, strict=True)
    return torch.cat(losses), torch.cat(kls), torch.cat(right)


def forced_logits(pair: ModelPair, model: nn.Module, batch: ForcedBatch) -> Float[Tensor, "n d_vocab"]:
    """Float32 logits that predict the completion tokens; `model` is the pair's twin under some policy."""
    with (
        fast_products(pair.device, pair.dtype),
        unembed_only(pair.hf.get_output_embeddings(), batch.row, batch.position),
    ):
        return run_twin(model, batch.tokens, attention_mask=batch.mask, use_cache=False).logits[0].float()
