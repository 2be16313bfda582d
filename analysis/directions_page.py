"""Cards of singular directions, from site to head to direction: a page without scripts that is read top down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files

import pandas as pd

from spd_lens.audit.core import Piece
from spd_lens.examples import Example

from .reading import context, document, safe

COMMON = 0.05
"""A read-out token that more than this share of the random poles of its head have too is shown pale: it says little
on the direction."""

_KINDS = {"k": "keys", "v": "values"}


def cards_page(
    name: str,
    measures: pd.DataFrame,
    tokens: pd.DataFrame,
    examples: Sequence[Example],
    pieces: Sequence[Sequence[Piece]],
    *,
    says: str = "",
    model: str = "",
) -> str:
    """The page as HTML, from what `directions.read_directions` gave.

    Args:
        name: Name of the run.
        measures: The first frame of `read_directions`.
        tokens: The second frame of `read_directions`.
        examples: The calibration examples.
        pieces: Their tokens (`reading.pieces_of`).
        says: The findings, in sentences.
        model: Name of the model.
    """
    sites = list(dict.fromkeys(measures["site"]))
    links = " · ".join(f'<a href="#s{safe(site)}">{safe(_site_name(site))}</a>' for site in sites)
    body = [_LEGEND, f'<p class="note">Go to {links}</p>']
    for site in sites:
        body.append(f'<h2 id="s{safe(site)}">{safe(_site_name(site))}</h2>')
        part = measures[measures["site"] == site]
        for head, rows in part.groupby("head", sort=False):
            mine = tokens[(tokens["site"] == site) & (tokens["head"] == head)]
            queries = sorted({int(q) for q in mine["query_head"] if q >= 0})
            serves = f", read by query heads {', '.join(map(str, queries))}" if queries else ""
            body.append(f'<h3 class="head">KV head {safe(head)}{serves}</h3>')
            for direction, numbers in rows.groupby("direction", sort=True):
                own = mine[mine["direction"] == direction]
                body.append(_card(site, str(head), int(direction), numbers, own, examples, pieces))
    facts = [f"{len(examples)} calibration examples", f"run {name}", model]
    style = files("spd_lens.analysis").joinpath("directions.css").read_text(encoding="utf-8")
    return document("What singular directions mean", "\n".join(body), says=says, facts=facts, style=style)


_LEGEND = f"""<section class="panel how">
<p>A singular vector has no sign, so both poles are read. For values, moving along <b class="plus">+</b> lowers the loss
on average; for keys, whose gradients cancel over tokens (softmax does not see a shift that all keys share),
<b class="plus">+</b> is where the head's queries point on average, and <b class="minus">−</b> the other way.</p>
<p><b>Values</b>: tokens whose logits rise most when a value moves that way, through each query head's part of
W<sub>O</sub>, the final norm's gain and the unembedding; hover for standard deviations over the vocabulary. Tokens that
more than {COMMON:.0%} of random directions of the head promote too are <span class="common">pale</span>. Layers in
between are left out: for early layers this is only what reaches the output directly.</p>
<p><b>Keys</b>: tokens whose queries point along the pole (cosine, before RoPE: relative position 0). They attend more
to tokens whose keys move that way.</p>
<p><b>Pull</b>: tokens whose own gradient is largest along the direction, in nats per unit, and the pole they ask for.
At most one token per example, and not the first token, which the numbers of each card are about. Numbers in grey: mean
of random directions of the same head; p: share of them that have as much.</p></section>"""


def _site_name(site: str) -> str:
    layer, _, kind = str(site).partition(".")
    return f"layer {layer}, {_KINDS.get(kind, kind)}"


def _card(
    site: str,
    head: str,
    direction: int,
    numbers: pd.DataFrame,
    own: pd.DataFrame,
    examples: Sequence[Example],
    pieces: Sequence[Sequence[Piece]],
) -> str:
    by = numbers.set_index("measure")
    facts = [f"singular value <b>{numbers['singular_value'].iloc[0]:.3g}</b>"]
    for measure, shown in (
        ("energy share", "{:.1%} of the head’s energy"),
        ("first-token share", "{:.0%} of it at the first token"),
        ("effective examples", "carried by {:.1f} examples"),
        ("one-sidedness", "one-sided {:.2f}"),
        ("vocabulary kurtosis", "vocabulary kurtosis {:.2f}"),
        ("query energy", "query energy {:.2f}"),
    ):
        if measure in by.index:
            value, null, p = (float(by[column][measure]) for column in ("value", "null", "p"))
            number = shown.format(value)
            null_number = f"{null:.1%}" if "%" in shown else f"{null:.2f}"
            facts.append(f'<b>{safe(number)}</b> <span class="null">random {null_number}, p {p:.2g}</span>')
    sections = []
    vocabulary = own[own["role"] == "vocabulary"]
    if len(vocabulary):
        sections.append(_vocabulary(vocabulary))
    queries = own[own["role"] == "query"]
    for pole in "+-" if len(queries) else "":
        rows = queries[queries["pole"] == pole]
        title = f"{_pole(pole)} queries that match"
        sections.append(_contexts(title, rows, examples, pieces, lambda r: f"{r.value:.2f} · head {r.query_head}"))
    pulls = own[own["role"] == "pull"]
    sections.append(
        _contexts("pull hardest", pulls, examples, pieces, lambda r: f"{r.value:.2g}", with_pole=True)
    )  # fmt: skip
    name = f"{_site_name(site)}, head {head}, direction {direction}"
    return (
        f'<article class="card" aria-label="{safe(name)}"><header><h3>direction {direction}</h3>'
        f'<span class="size">{" · ".join(facts)}</span></header>{"".join(sections)}</article>'
    )


def _vocabulary(rows: pd.DataFrame) -> str:
    lines = []
    for query, mine in rows.groupby("query_head", sort=True):
        cells = []
        for pole in "+-":
            chosen = mine[mine["pole"] == pole].sort_values("place")
            cells.append(f"<td>{_pole(pole)} {' '.join(map(_read_token, chosen.itertuples()))}</td>")
        lines.append(f'<tr><td class="n">query head {int(query)}</td>{"".join(cells)}</tr>')
    return f'<table class="vocabulary">{"".join(lines)}</table>'


def _read_token(row: object) -> str:
    value, null, text = (getattr(row, name) for name in ("value", "null", "token"))
    kind = "tok common" if null > COMMON else "tok"
    shown = safe(text).replace(" ", "␣", 1) if str(text).startswith(" ") else safe(text).replace("\n", "↵")
    title = f"{value:.1f} standard deviations; among the first of {null:.1%} of random poles"
    return f'<span class="{kind}" title="{safe(title)}">{shown}</span>'


def _contexts(
    title: str,
    rows: pd.DataFrame,
    examples: Sequence[Example],
    pieces: Sequence[Sequence[Piece]],
    number: object,
    *,
    with_pole: bool = False,
) -> str:
    assert callable(number)
    lines: Iterable[str] = (
        f'<tr><td class="n">{_pole(r.pole) + " " if with_pole else ""}{safe(number(r))}</td>'
        f'<td class="ctx" title="{safe(examples[int(r.example)].id)} · position {int(r.position)}">'
        f"{context(pieces[int(r.example)], int(r.position))}</td></tr>"
        for r in rows.sort_values("place").itertuples()
    )
    inside = f"<table>{''.join(lines)}</table>" if len(rows) else '<p class="none">no query points this way</p>'
    return f'<section class="contexts"><h4>{title}</h4>{inside}</section>'


def _pole(pole: str) -> str:
    return '<b class="plus">+</b>' if pole == "+" else '<b class="minus">−</b>'
