"""A calibration example token by token, as pages and tables show it."""

from __future__ import annotations

from collections.abc import Sequence

from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.models import Loss, PromptFormat
from spd_lens.spans import Piece, audit


def pieces_of(examples: Sequence[Example], format: PromptFormat, loss: Loss = "aligned") -> list[tuple[Piece, ...]]:
    """Each example's tokens with their texts, as the loss sees them (`spd_lens.audit`).

    Raises `SPDError` for an example that has no tokens or no loss.
    """
    found = []
    for item in audit(examples, format, loss).examples:
        if not item.size:
            reason = item.flags[0].text if item.flags else "it has no scored token"
            raise SPDError(f"example {item.example.id or item.example.prompt[:40]!r} cannot be read: {reason}")
        found.append(item.pieces)
    return found


def tokens_of(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces that are tokens, so that the index is the position."""
    return [piece for piece in pieces if piece.id is not None]


def spelled(piece: Piece) -> str:
    """A token's text; where it has none, the tokenizer's spelling, or `⋯` for a further part of one character."""
    return piece.text or (piece.token if len(piece.token) > 2 else "⋯")


def context(pieces: Sequence[Piece], position: int, *, before: int = 14, after: int = 5) -> tuple[str, str, str]:
    """A token among its neighbours on one line: what is left of it, itself, and what is right of it."""
    tokens = tokens_of(pieces)
    low, high = max(0, position - before), min(len(tokens), position + after + 1)

    def text(chosen: Sequence[Piece]) -> str:
        return "".join(map(spelled, chosen)).replace("\n", "↵")

    left, right = "… " if low else "", " …" if high < len(tokens) else ""
    middle = tokens[position : position + 1]
    return left + text(tokens[low:position]), text(middle), text(tokens[position + 1 : high]) + right
