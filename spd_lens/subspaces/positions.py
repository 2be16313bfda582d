"""Classes of token positions, of which moments can be kept apart: sink, prompt, completion, scored."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, get_args

from spd_lens.models import Encoded, ModelPair, attention_received

PositionClass = Literal["sink", "prompt", "completion", "scored"]
CLASSES: tuple[str, ...] = get_args(PositionClass)
"""Disjoint: a sink is nothing else, and what is scored is neither prompt nor completion."""


def positions_by_class(encoded: Encoded, sinks: Collection[int] = (0,)) -> dict[str, list[int]]:
    """The positions of each class in an example, in ascending order; each position is in exactly one.

    `scored` are the positions of the tokens in `S` (Eq. 6), `completion` the others of the completion, and `prompt` all
    that stands before it, template and special tokens included.

    Args:
        encoded: The example's tokens.
        sinks: Positions on which attention rests when it has nowhere to go; the first token, unless others are known.
    """
    found: dict[str, list[int]] = {name: [] for name in CLASSES}
    scored = set(encoded.scored)
    for position in range(len(encoded.ids)):
        inside = "completion" if position >= encoded.completion_start else "prompt"
        found["sink" if position in sinks else "scored" if position in scored else inside].append(position)
    return found


def sinks_of(pair: ModelPair, encoded: Encoded, layers: Sequence[int], rule: str) -> tuple[int, ...]:
    """The positions on which an example's attention rests: the first token, or the one that receives most attention.

    `"attended"` goes by the mean over the layers, which are those whose gradients are taken, and their heads: one layer
    alone may have no sink yet (the first ones) or none of the usual place, and one choice for all keeps the classes the
    same at every site. A position counts if at least half of all queries can see it, for on the last ones a mean is of
    a few queries only, each of which attends to itself and its neighbours.

    Raises:
        SPDError: `"attended"` where the architecture's attention does not give its weights.
    """
    if rule == "first":
        return (0,)
    received = attention_received(pair.hf, encoded.ids, layers)
    return (int(received[: (len(encoded.ids) + 1) // 2].argmax()),)
