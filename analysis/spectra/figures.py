"""Figures of spectra, each from one of the tables of `measures`."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from spd_lens.analysis.common import band, bars, figure, line, log_axis, middle_and_range, panel_for_each
from spd_lens.analysis.spectra.measures import (
    ACTIVATIONS,
    CENTRED,
    ENERGY,
    GRADIENTS,
    HELD_OUT,
    NULLS,
    SHUFFLED,
    SINGULAR,
    widths,
)
from spd_lens.subspaces import Rank, resolve_rank

MANY_HEADS = 4
"""Beyond this many heads a panel shows their median and range instead of a line each."""

_SYMBOLS = {SHUFFLED: "square-open", ACTIVATIONS: "circle-open", CENTRED: "diamond-open"}
_BELOW = {SHUFFLED: 0.3, ACTIVATIONS: 0.15, CENTRED: 0.15}
_SHOWN = tuple(sorted({round(2 ** (i / 2)) for i in range(30)}))
"""Ranks with a marker: enough for a log axis, and symbols stay apart."""


def cumulative_figure(curves: pd.DataFrame, *, per_head: bool = True) -> go.Figure:
    """Energy share against rank, a panel per site: each head, the held-out mean over heads, the nulls' means."""
    mine = _thinned(curves[(curves["head"] != "all") == per_head])
    fig, sites = panel_for_each(
        mine,
        "site",
        "How much of the gradient energy the leading directions hold",
        "rank (directions, log scale)",
        "share of energy ‖G‖²",
        says=f"{'per head' if per_head else 'all heads jointly'}; bands: 95 %, delete-half jackknife over shards; "
        "grey: nulls, mean over heads",
    )
    for part, here in sites:
        gradients = part[part.source == GRADIENTS]
        used = _heads(fig, gradients[gradients.measure == ENERGY], here)
        held = gradients[gradients.measure == HELD_OUT].groupby("rank", as_index=False).value.mean()
        name = "held-out half"
        line(fig, held["rank"], held.value, name, index=used, legendgroup=name, **here)
        _nulls(fig, part[part.measure == ENERGY], here)
    _log_ranks(fig, mine.width.max())
    fig.update_yaxes(range=[0, 1.03])
    fig.add_hline(y=0.9, line={"color": "#999999", "width": 1})
    return fig


def singular_figure(curves: pd.DataFrame) -> go.Figure:
    """Singular values relative to the largest, per site; the median over heads, with the nulls."""
    mine = _thinned(curves[(curves["head"] != "all") & (curves.measure == SINGULAR)])
    mine = mine.assign(value=mine.value / mine.groupby(["site", "head", "source"]).value.transform("max"))
    fig, sites = panel_for_each(
        mine,
        "site",
        "Singular values, relative to the largest",
        "number of the singular value (log scale)",
        "σ / σ₁ (log scale)",
        says="gradients: median over heads, band from lowest to highest head; grey: nulls, mean over heads",
    )
    for part, here in sites:
        middle_and_range(fig, part[part.source == GRADIENTS], "rank", GRADIENTS, **here)
        _nulls(fig, part, here)
    _log_ranks(fig, mine.width.max())
    fig.update_yaxes(type="log", exponentformat="power", dtick=1)
    return fig


def ranks_figure(ranks: pd.DataFrame, measure: str = "rank of 90 % energy") -> go.Figure:
    """An effective rank of every site and head with its interval, beside the nulls."""
    mine = ranks[(ranks.measure == measure) & (ranks["head"] != "all")]
    fig = figure(
        "How many directions hold 90 % of the energy" if "90" in measure else measure.capitalize(),
        f"directions of {widths(mine)} (log scale)",
        "site · head",
        says="bars: 95 %, delete-half jackknife over shards; grey: nulls",
    )
    labels = list(dict.fromkeys(mine.site + " · " + mine["head"]))
    for source in (*NULLS, GRADIENTS):
        part = mine[mine.source == source]
        if part.empty:
            continue
        null = source != GRADIENTS
        here = [labels.index(label) for label in part.site + " · " + part["head"]]
        # nulls below the gradients' line, so that equal values do not hide one another
        line(
            fig, part.value, [y + _BELOW.get(source, 0.0) for y in here], source, null=null, mode="markers",
            symbol=_SYMBOLS.get(source, ""), size=9 if null else 11, hovertext=part.site + " · head " + part["head"],
            error_x=bars(part.value, part.low, part.high, thickness=1 if null else 2),
        )  # fmt: skip
    fig.update_yaxes(range=[len(labels) - 0.3, -0.7], tickvals=list(range(len(labels))), ticktext=labels)
    fig.update_layout(height=max(420, 200 + 26 * len(labels)), margin={"l": 100})
    fig.update_layout(legend={"y": -0.24})
    _log_ranks(fig, mine.width.max())
    return fig


def kept_figure(kept: pd.DataFrame) -> go.Figure:
    """Share of the activations' energy that the gradient subspace keeps, of their mean and of the rest."""
    mine = _thinned(kept[kept["head"] != "all"])
    fig, sites = panel_for_each(
        mine,
        "site",
        "How much of the activations the gradient subspace keeps",
        "rank (directions, log scale)",
        "share of activation energy",
        says="mean over heads; grey: random subspaces, with the 95 % range of one head's for the rest",
    )
    for at_site, here in sites:
        table = at_site.groupby(["part", "rank"])[["value", "chance", "random_low", "random_high"]].mean()
        chance = table.loc["rest"]
        band(fig, chance.index, chance.random_low, chance.random_high, null=True, **here)
        line(fig, chance.index, chance.chance, "chance: rank / width", null=True, legendgroup="chance", **here)
        for index, (part, name) in enumerate({"mean": "of the mean activation", "rest": "of the rest"}.items()):
            rows = table.loc[part]
            line(fig, rows.index, rows.value, name, index=index, legendgroup=name, **here)
    _log_ranks(fig, mine.width.max())
    fig.update_yaxes(range=[0, 1.03])
    return fig


def layers_figure(ranks: pd.DataFrame, measure: str = "rank of 90 % energy") -> go.Figure:
    """An effective rank by layer, a line per kind: median over heads, band from the lowest to the highest head."""
    mine = ranks[ranks.measure == measure]
    fig = figure(
        f"By layer: {measure}",
        "layer (block index)",
        f"directions of {widths(mine)}",
        says="median over heads; bands from the lowest to the highest head",
    )
    for index, kind in enumerate(dict.fromkeys(mine.kind)):
        middle_and_range(fig, mine[mine.kind == kind], "layer", kind.upper(), index=index)
    fig.update_yaxes(rangemode="tozero")
    return fig


def kept_sentence(kept: pd.DataFrame, rank: Rank) -> str:
    """What the subspace of the run's rank keeps of the activations, against random subspaces of that rank."""
    mine = kept[kept["head"] != "all"]
    mine = mine[mine["rank"] == mine.width.map(lambda width: resolve_rank(rank, int(width)))]
    parts = []
    for part in ("mean", "rest"):
        rows = mine[mine.part == part]
        outside = (rows.low > rows.random_high) | (rows.high < rows.random_low)
        parts.append(
            f"{rows.value.mean():.2f} of the energy of {'their mean' if part == 'mean' else 'the rest'} (outside the "
            f"random range in {int(outside.sum())} of {len(rows)} heads)"
        )
    chance = mine.chance.mean()
    return f"At the run's rank the subspace keeps of the activations {' and '.join(parts)}; chance is {chance:.2f}."


def _heads(fig: go.Figure, rows: pd.DataFrame, here: dict[str, Any]) -> int:
    """Add the lines of the heads, and return how many colours they take."""
    heads = list(dict.fromkeys(rows["head"]))
    if len(heads) > MANY_HEADS:
        middle_and_range(fig, rows, "rank", "heads: median and range", **here)
        return 1
    for index, head in enumerate(heads):
        part = rows[rows["head"] == head]
        name = "all heads" if head == "all" else f"head {head}"
        band(fig, part["rank"], part.low, part.high, index=index, **here)
        line(fig, part["rank"], part.value, name, index=index, legendgroup=name, **here)
    return len(heads)


def _nulls(fig: go.Figure, rows: pd.DataFrame, here: dict[str, Any]) -> None:
    for source in NULLS:
        part = rows[rows.source == source].groupby("rank", as_index=False).value.mean()
        if not part.empty:
            line(fig, part["rank"], part.value, source, null=True, symbol=_SYMBOLS[source], legendgroup=source, **here)


def _thinned(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["rank"].isin(_SHOWN) | (rows["rank"] == rows.width)]


def _log_ranks(fig: go.Figure, width: int) -> None:
    log_axis(fig, [2**i for i in range(20) if 2**i <= width])
