"""Two texts word by word: what stayed, what went, what came."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import NamedTuple

MAX_WORDS = 400
"""Longer texts are compared up to here: matching takes the product of the lengths."""


class Piece(NamedTuple):
    """A stretch of two texts: the same words in both, or what stands there in one and in the other."""

    same: bool
    before: str
    after: str


def word_diff(before: str, after: str) -> list[Piece]:
    """Two texts in pieces: all `before` joined are the first text, all `after` the second.

    Words carry the white space behind them; a word that differs in that space alone counts as the same. Beyond
    `MAX_WORDS` words the rest of both texts is one piece.
    """
    old, new = _words(before), _words(after)
    rest = "".join(old[MAX_WORDS:]), "".join(new[MAX_WORDS:])
    old, new = old[:MAX_WORDS], new[:MAX_WORDS]
    # autojunk would drop words that are frequent, and repetition is what one looks for here
    matcher = SequenceMatcher(None, [word.strip() for word in old], [word.strip() for word in new], autojunk=False)
    pieces = [
        Piece(what == "equal", "".join(old[i1:i2]), "".join(new[j1:j2]))
        for what, i1, i2, j1, j2 in matcher.get_opcodes()
    ]
    pieces = _without_coincidences(pieces)
    return [*pieces, Piece(rest[0] == rest[1], *rest)] if any(rest) else pieces


def _without_coincidences(pieces: list[Piece]) -> list[Piece]:
    """A single word that stayed between two longer changes is chance ("the"); the changes become one."""
    kept: list[Piece] = []
    for i, piece in enumerate(pieces):
        neighbours = pieces[i - 1 : i] + pieces[i + 1 : i + 2]
        alone = piece.same and len(_words(piece.after)) == 1 and len(neighbours) == 2
        if alone and all(max(len(_words(n.before)), len(_words(n.after))) > 2 for n in neighbours):
            piece = piece._replace(same=False)
        if kept and not piece.same and not kept[-1].same:
            piece = Piece(False, kept[-1].before + piece.before, kept.pop().after + piece.after)
        kept.append(piece)
    return kept


def _words(text: str) -> list[str]:
    """With the white space behind each; white space before the first word is a word of its own."""
    return re.findall(r"^\s+|\S+\s*", text)
