"""Text token by token on pages without scripts: coloured, escaped, each token with its numbers under the pointer."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from spd_lens.audit.core import Piece, audit
from spd_lens.audit.safe_text import visible
from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.models.prompts import Loss, PromptFormat

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""A page's own rule: nothing runs and nothing is fetched, even where escaping had a mistake."""


def safe(text: object) -> str:
    """Text from data or models, for HTML."""
    return escape(visible(str(text)))


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


def token(piece: Piece, *, classes: str = "", style: str = "", title: str = "") -> str:
    """One token as a span; `style` and `title` are made here and not from data, except that both are escaped."""
    shown = safe(piece.text).replace("\n", "<i>↵</i>\n") if piece.text else f"<i>{safe(spelled(piece))}</i>"
    if piece.id is None:
        return shown
    marks = "".join(
        f' {name}="{safe(value)}"' for name, value in (("class", classes), ("style", style), ("title", title)) if value
    )
    return f"<span{marks}>{shown}</span>"


def context(pieces: Sequence[Piece], position: int, *, before: int = 14, after: int = 5) -> str:
    """A token among its neighbours on one line, as HTML: `… the total is <mark>42</mark> apples …`."""
    tokens = tokens_of(pieces)
    low, high = max(0, position - before), min(len(tokens), position + after + 1)

    def text(chosen: Sequence[Piece]) -> str:
        return "".join(safe(spelled(piece)) for piece in chosen).replace("\n", "↵")

    left, right = "… " if low else "", " …" if high < len(tokens) else ""
    mark = f"<mark>{text(tokens[position : position + 1])}</mark>"
    return f"{left}{text(tokens[low:position])}{mark}{text(tokens[position + 1 : high])}{right}"


def document(title: str, body: str, *, says: str = "", facts: Sequence[str] = (), style: str = "") -> str:
    """A whole page around `body`, which is HTML; title, `says` and `facts` are text."""
    sheet = files("spd_lens.analysis").joinpath("reading.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{safe(title)}</title>
<style>
{sheet}{style}</style>
</head>
<body>
<main>
<h1>{safe(title)}</h1>
<p class="facts">{" · ".join(map(safe, facts))}</p>
<p class="says">{safe(says)}</p>
{body}
</main>
</body>
</html>
"""
