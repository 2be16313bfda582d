"""Figures of overlaps, each from one of the tables of `energy` and `angles_table`."""

from __future__ import annotations

from itertools import combinations

import pandas as pd
import plotly.graph_objects as go

from spd_lens.analysis.common import (
    SEQUENTIAL,
    band,
    bars,
    figure,
    line,
    log_axis,
    middle_and_range,
    panel,
    panel_for_each,
    panels,
    plain,
)

OWN, OTHER, CHANCE = "own other half (ceiling)", "another domain", "chance: rank / width"
NULLS = {"shuffled": "own prompts, shuffled answers", "activations": "own activations"}
_SYMBOLS = {"shuffled": "square-open", "activations": "diamond-open"}


def heat_map_figure(frame: pd.DataFrame, rank: int, *, heads: bool = False) -> go.Figure:
    """Domain × domain maps of the energy share at one rank: a panel per site (mean over heads), or per site and head.

    Rows are the subspace's domain, columns the domain whose gradients it should hold; the diagonal is the ceiling.
    """
    mine = frame[frame["rank"] == rank]
    if heads:
        mine = mine[mine.of == "domain"]
    keys = ["site", "head"] if heads else ["site"]
    names = list(dict.fromkeys(mine.b))
    groups = [(key, rows) for key, rows in mine.groupby(keys, sort=False)]
    chance = mine.chance.mean()
    fig = panels(
        [" · head ".join(key) if heads else f"site {key[0]}" for key, _ in groups],
        f"Share of a domain's gradient energy in {rank} of {int(mine.width.iloc[0])} directions of another's",
        "gradients of",
        "subspace of",
        columns=3 if heads else min(4, len(groups)),
        says=f"{'' if heads else 'mean over heads; lower rows: nulls; '}diagonal: two halves of one domain (ceiling); "
        f"chance is {chance:.3g}",
    )
    for n, (_, rows) in enumerate(groups):
        table = rows[rows.of == "domain"].groupby(["a", "b"]).value.mean().unstack().loc[names, names]
        for of, label in NULLS.items():  # of each column's own domain
            null = rows[(rows.of == of) & (rows.a == rows.b)].groupby("b").value.mean()
            if not null.empty:
                table.loc[label] = null
        labels = [plain(name) for name in names]
        fig.add_trace(
            go.Heatmap(
                z=table.to_numpy(), x=labels, y=[plain(name) for name in table.index], coloraxis="coloraxis",
                texttemplate="%{z:.2f}",
                hovertemplate="subspace of %{y}, gradients of %{x}: %{z:.3f}<extra></extra>", **panel(n),
            )
        )  # fmt: skip
    fig.update_layout(
        coloraxis={"colorscale": SEQUENTIAL, "cmin": 0, "cmax": 1, "colorbar": {"title": "energy<br>share"}}
    )
    fig.update_yaxes(autorange="reversed")
    return fig


def energy_figure(frame: pd.DataFrame) -> go.Figure:
    """Energy share against rank, a panel per site: own other half, other domains (mean and range), chance."""
    fig, sites = panel_for_each(
        frame,
        "site",
        "Gradient energy held by a domain's own subspace and by the others'",
        "rank (directions, log scale)",
        "energy share tr(P C)/tr C",
        says="mean over heads and domains; bands: lowest to highest pair of domains; grey: nulls",
    )
    for part, here in sites:
        pairs = part.groupby(["of", "a", "b", "rank"], as_index=False)[["value", "chance"]].mean()
        rows = pairs[pairs.of == "domain"]
        for index, (name, own) in enumerate({OWN: rows.a == rows.b, OTHER: rows.a != rows.b}.items()):
            middle_and_range(fig, rows[own], "rank", name, middle="mean", index=index, **here)
        for of, name in NULLS.items():
            null = pairs[(pairs.of == of) & (pairs.a == pairs.b)].groupby("rank").value.mean()
            if not null.empty:
                line(fig, null.index, null, name, null=True, symbol=_SYMBOLS[of], legendgroup=name, **here)
        chance = rows.groupby("rank").chance.mean()
        line(fig, chance.index, chance, CHANCE, null=True, legendgroup=CHANCE, **here)
    log_axis(fig, sorted(set(frame["rank"])))
    fig.update_yaxes(range=[0, 1.03])
    return fig


def layers_figure(frame: pd.DataFrame, rank: int) -> go.Figure:
    """Energy share by layer at one rank, a panel per kind: each two domains (both ways), the ceiling, chance."""
    mine = frame[(frame["rank"] == rank) & (frame.of == "domain")]
    fig, kinds = panel_for_each(
        mine,
        "kind",
        f"Overlap by layer, {rank} of {int(mine.width.iloc[0])} directions",
        "layer (block index)",
        "energy share tr(P C)/tr C",
        says="mean over heads, and over both directions of a pair; grey: ceiling (own other half) and chance",
    )
    for part, here in kinds:
        rows = part.groupby(["layer", "a", "b"], as_index=False)[["value", "chance"]].mean()
        own = rows[rows.a == rows.b].groupby("layer").value.mean()
        line(fig, own.index, own, OWN, null=True, symbol="diamond-open", legendgroup=OWN, **here)
        chance = rows.groupby("layer").chance.mean()
        line(fig, chance.index, chance, CHANCE, null=True, legendgroup=CHANCE, **here)
        for index, pair in enumerate(combinations(sorted(set(rows.a)), 2)):
            both_ways = rows[(rows.a != rows.b) & rows.a.isin(pair) & rows.b.isin(pair)]
            table = both_ways.groupby("layer").value.mean()
            name = " – ".join(plain(one) for one in pair)
            line(fig, table.index, table, name, index=index, legendgroup=name, **here)
    fig.update_yaxes(range=[0, 1.03])
    return fig


def angles_figure(frame: pd.DataFrame) -> go.Figure:
    """Principal angles of pairs of subspaces (column `pair`) by number, a panel per site, against random subspaces."""
    fig, sites = panel_for_each(
        frame,
        "site",
        "Principal angles between domains' subspaces",
        "number of the angle",
        "angle (degrees)",
        says="mean over heads; grey: random subspaces of this rank, with the range of 95 % of one head's",
    )
    for rows, here in sites:
        null = rows.groupby("number")[["chance", "random_low", "random_high"]].mean()
        band(fig, null.index, null.random_low, null.random_high, null=True, **here)
        line(fig, null.index, null.chance, "random subspaces", null=True, legendgroup="random", **here)
        for index, pair in enumerate(dict.fromkeys(rows.pair)):
            table = rows[rows.pair == pair].groupby("number").value.mean()
            line(fig, table.index, table, plain(pair), index=index, legendgroup=pair, **here)
    fig.update_yaxes(range=[0, 93], tickvals=[0, 30, 60, 90])
    return fig


def exchange_figure(frame: pd.DataFrame) -> go.Figure:
    """Permutation tests of pairs of domains (column `pair`): the overlap as it is, and after exchanging shards."""
    mine = frame[frame.site == "all"]
    fig = figure(
        "Do two domains draw from one pool?",
        "mean energy share of both directions, all sites and heads",
        "",
        says="grey: after exchanging shards between the two domains, mean and 95 %; to the left of it: they differ",
    )
    labels = [plain(pair) for pair in mine.pair]
    exchanged = bars(mine.null, mine.null_low, mine.null_high)
    line(fig, mine.null, labels, "shards exchanged", null=True, mode="markers", error_x=exchanged)
    text = [f"p = {p:.2g}" for p in mine.p_permutation]
    line(fig, mine.value, labels, "as it is", size=11, mode="markers+text", text=text, textposition="middle right")
    fig.update_yaxes(autorange="reversed", type="category")
    fig.update_layout(height=240 + 60 * len(mine), margin={"l": 140, "b": 110}, legend={"y": -0.45})
    return fig
