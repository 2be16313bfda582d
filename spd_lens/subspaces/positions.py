"""Classes of token positions, of which moments can be kept apart: sink, prompt, completion, scored."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, get_args

from spd_lens.models import Encoded

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
