"""Cards of singular directions, from site to head to direction: a page without scripts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from spd_lens.analysis.common import PACKAGE, context
from spd_lens.examples import Example
from spd_lens.output import render
from spd_lens.spans import Piece

COMMON = 0.05
"""A token that more than this share of the random poles of its head read out too is shown pale: it says little about
the direction."""

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
        pieces: The tokens of the examples (`pieces_of`).
        says: The findings, in sentences.
        model: Name of the model.
    """
    sites = []
    for site, part in measures.groupby("site", sort=False):
        heads = []
        for head, rows in part.groupby("head", sort=False):
            mine = tokens[(tokens["site"] == site) & (tokens["head"] == head)]
            cards = [
                _card(int(direction), numbers, mine[mine["direction"] == direction], examples, pieces)
                for direction, numbers in rows.groupby("direction", sort=True)
            ]
            queries = sorted({int(q) for q in mine["query_head"] if q >= 0})
            heads.append({"name": head, "queries": queries, "cards": cards})
        sites.append({"id": site, "name": _site_name(site), "heads": heads})
    return render(
        "directions.html", package=PACKAGE, title="What singular directions mean", says=says, sites=sites,
        facts=[f"{len(examples)} calibration examples", f"run {name}", model], common=f"{COMMON:.0%}",
    )  # fmt: skip


def _site_name(site: str) -> str:
    layer, _, kind = str(site).partition(".")
    return f"layer {layer}, {_KINDS.get(kind, kind)}"


def _card(
    direction: int,
    numbers: pd.DataFrame,
    own: pd.DataFrame,
    examples: Sequence[Example],
    pieces: Sequence[Sequence[Piece]],
) -> dict[str, Any]:
    by = numbers.set_index("measure")
    facts = []
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
            null_number = f"{null:.1%}" if "%" in shown else f"{null:.2f}"
            facts.append((shown.format(value), f"random {null_number}, p {p:.2g}"))

    def contexts(title: str, rows: pd.DataFrame, number: Callable[[Any], str], pole: str = "") -> dict[str, Any]:
        """Tokens in their contexts; each has its own pole unless the whole section has one."""
        lines = [
            {
                "pole": "" if pole else row.pole,
                "number": number(row),
                "where": f"{examples[int(row.example)].id} · position {int(row.position)}",
                "text": context(pieces[int(row.example)], int(row.position)),
            }
            for row in rows.sort_values("place").itertuples()
        ]
        return {"title": title, "pole": pole, "rows": lines}

    queries, pulls = own[own["role"] == "query"], own[own["role"] == "pull"]
    sections = [
        contexts("queries that match", own_pole, lambda r: f"{r.value:.2f} · head {r.query_head}", pole)
        for pole in ("+-" if len(queries) else "")
        for own_pole in (queries[queries["pole"] == pole],)
    ]
    sections.append(contexts("pull hardest", pulls, lambda r: f"{r.value:.2g}"))
    sigma = numbers["singular_value"].iloc[0]
    return {
        "direction": direction, "value": "–" if pd.isna(sigma) else f"{sigma:.3g}", "numbers": facts,
        "vocabulary": _vocabulary(own[own["role"] == "vocabulary"]), "contexts": sections,
    }  # fmt: skip


def _vocabulary(rows: pd.DataFrame) -> list[tuple[int, list[tuple[str, list[tuple[str, str, bool]]]]]]:
    """For each query head and pole: the tokens with their hover texts, and whether each says little."""
    return [
        (int(query), [(p, [_read_token(r) for r in part.sort_values("place").itertuples()])
                      for p in "+-" for part in (mine[mine["pole"] == p],)])
        for query, mine in rows.groupby("query_head", sort=True)
    ]  # fmt: skip


def _read_token(row: Any) -> tuple[str, str, bool]:
    text = str(row.token)
    shown = text.replace(" ", "␣", 1) if text.startswith(" ") else text.replace("\n", "↵")
    title = f"{row.value:.1f} standard deviations; among the first of {row.null:.1%} of random poles"
    return shown, title, row.null > COMMON
