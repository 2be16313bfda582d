"""The span audit as one HTML page without scripts, fonts or images from elsewhere.

The text comes from data files and is not trusted: all of it is escaped, and the page's own policy forbids scripts and
requests, so that a mistake in escaping would still not run anything. The filters are check boxes and CSS.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import median

from spd_lens.audit.core import KINDS, Audit, AuditedExample, Bin, Piece
from spd_lens.audit.safe_text import visible
from spd_lens.audit.terminal import amount, between, bin_name, inside, place_name
from spd_lens.storage import write_text

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_RULES = {
    "aligned": "Scored tokens are those that the loss looks at: the tokens that overlap a span of characters which "
    "decide correctness. Numbers above bars are examples; one with several scored tokens is spread over them.",
    "full": "The full loss scores every token of the completion. Spans are not looked at.",
}


def write_page(path: str | Path, found: Audit, *, title: str, facts: Sequence[str] = ()) -> Path:
    """Write the page atomically; `SPDError` where that is not possible."""
    return write_text(path, page(found, title=title, facts=facts))


def page(found: Audit, *, title: str, facts: Sequence[str] = ()) -> str:
    """The page as HTML. `facts` stand under the title: model, split, seed."""
    style = files("spd_lens.audit").joinpath("page.css").read_text(encoding="utf-8")
    name = _text(title)
    cards = "\n".join(_card(item) for item in found.examples)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{name}</h1>
<p class="facts">{" · ".join(map(_text, facts))}</p>
<p class="rule">{_RULES[found.loss]}</p>
{_tiles(found)}
{_charts(found)}
{_flag_table(found)}
{_bar(found)}
{cards}
</main>
</body>
</html>
"""


def _text(text: str) -> str:
    return escape(visible(text))


def _tiles(found: Audit) -> str:
    total, sizes = len(found.examples), found.sizes
    tiles = [(f"{len(sizes)} of {total}", "examples have scored tokens")]
    if sizes:
        spread = f"({min(sizes)}\xa0to\xa0{max(sizes)})" if min(sizes) < max(sizes) else "(in every example)"
        tiles.append((f"{median(sizes):g}", f"median |S|, scored tokens per example {spread}"))
    if found.paper_sizes and found.share_in_paper_sizes is not None:
        said = f"of examples have the paper's |S|, {between(found.paper_sizes)} (table 6)"
        tiles.append((f"{found.share_in_paper_sizes:.0%}", said))
    tiles.append((f"{len(found.suspicious)} of {total}", "are suspicious"))
    shown = "".join(f'<div class="tile"><dt>{_text(what)}</dt><dd>{_text(value)}</dd></div>' for value, what in tiles)
    return f'<dl class="tiles">{shown}</dl>'


def _charts(found: Audit) -> str:
    if not found.sizes:
        return ""
    paper = found.paper_sizes
    band = f" (shaded: table 6, {between(paper)})" if paper else ""
    sizes = _chart(f"Scored tokens per example, |S|{band}", found.size_bins(), paper)
    places = _chart("Where in the completion they lie, in % of its tokens", found.place_bins(), None)
    return f'<div class="charts">{sizes}{places}</div>'


def _chart(title: str, bins: Sequence[Bin], paper: tuple[int, int] | None) -> str:
    width, height, top, foot = 480, 170, 18, 22
    step, most = width / len(bins), max(bar.count for bar in bins)
    parts = []
    for i, bar in enumerate(bins):
        middle, tall = (i + 0.5) * step, (height - top - foot) * bar.count / most
        if inside(bar, paper):
            parts.append(f'<rect class="band" x="{i * step:.1f}" y="0" width="{step:.1f}" height="{height - foot}"/>')
        thick = min(step * 0.72, 56)
        parts.append(
            f'<rect class="bar" x="{middle - thick / 2:.1f}" y="{height - foot - tall:.1f}" width="{thick:.1f}" '
            f'height="{tall:.1f}"/><text x="{middle:.1f}" y="{height - 7}" text-anchor="middle">'
            f"{bin_name(bar).removesuffix(' %')}</text>"
        )
        if bar.count:
            above = height - foot - tall - 5
            parts.append(f'<text x="{middle:.1f}" y="{above:.1f}" text-anchor="middle">{amount(bar)}</text>')
    axis = f'<line class="axis" x1="0" y1="{height - foot}" x2="{width}" y2="{height - foot}"/>'
    spoken = "; ".join(f"{bin_name(bar)}: {amount(bar)}" for bar in bins)
    return (
        f'<section class="panel"><h2>{_text(title)}</h2><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{_text(spoken)}">{"".join(parts)}{axis}</svg></section>'
    )


def _flag_table(found: Audit) -> str:
    counts = found.flag_counts()
    if not counts:
        return ""
    rows = "".join(
        f'<tr><td>{_text(KINDS[kind])}</td><td class="n">{bad or "–"}</td><td class="n">{harmless or "–"}</td></tr>'
        for kind, (bad, harmless) in counts.items()
    )
    head = '<tr><th>Flags, in number of examples</th><th class="n">suspicious</th><th class="n">harmless</th></tr>'
    return f'<section class="panel"><table>{head}{rows}</table></section>'


def _bar(found: Audit) -> str:
    boxes = (
        ("only", f"suspicious only ({len(found.suspicious)})"),
        ("bare", "hide prompts"),
        ("plain", "hide token borders"),
    )
    labels = "".join(f'<label><input type="checkbox" id="{id}">{text}</label>' for id, text in boxes)
    legend = (
        '<span class="legend"><pre style="display:inline;padding:0"><span class="s">42</span></pre> scored token · '
        "hover for its id</span>"
    )
    return f'<div class="bar-top">{labels}{legend}</div>'


def _card(item: AuditedExample) -> str:
    flags = "".join(
        f'<li class="bad">{_text(flag.text)}</li>' if flag.suspicious else f"<li>{_text(flag.text)}</li>"
        for flag in sorted(item.flags, key=lambda flag: not flag.suspicious)
    )
    # an example that could not be tokenised is shown as it is
    prompt = _tokens([p for p in item.pieces if not p.in_completion]) if item.pieces else _text(item.example.prompt)
    completion = _tokens([p for p in item.pieces if p.in_completion]) if item.pieces else _text(item.example.completion)
    total = sum(piece.id is not None for piece in item.pieces)
    place = f" · at {place_name(item)} of the completion" if item.size else ""
    return (
        f'<article class="card{" flagged" if item.suspicious else ""}"><header><h3>{_text(item.example.id)}</h3>'
        f'<span class="size"><b>|S| = {item.size}</b> of {total} tokens{place}</span></header>'
        + (f'<ul class="flags">{flags}</ul>' if flags else "")
        + f'<pre class="prompt" tabindex="0" aria-label="prompt">{prompt}</pre>'
        f'<pre class="completion">{completion}</pre></article>'
    )


def _tokens(pieces: Sequence[Piece]) -> str:
    return "".join(_token(piece, odd=bool(i % 2)) for i, piece in enumerate(pieces))


def _token(piece: Piece, odd: bool) -> str:
    if piece.id is None:
        return _text(piece.text)
    shown = _text(piece.text).replace("\n", "<i>↵</i>\n")
    if not piece.text:
        # a special token without text, or a further part of the character before
        shown = f"<i>{_text(piece.token) if len(piece.token) > 2 else '⋯'}</i>"
    kind = ' class="s"' if piece.scored else ' class="o"' if odd else ""
    title = f"position {piece.position} · id {piece.id} · {_text(piece.token)}"
    return f'<span{kind} title="{title}">{shown}</span>'
