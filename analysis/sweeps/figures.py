"""Figures of a sweep's table: heat maps, rank curves, and loss against damage; random subspaces grey and dotted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from spd_lens.analysis.common import (
    DIVERGING,
    LOSS_FIELDS,
    NULL_COLOR,
    band,
    deciding,
    figure,
    line,
    panel,
    panels,
    plain,
)
from spd_lens.analysis.sweeps.recommend import ALPHA
from spd_lens.analysis.sweeps.store import MEASURES


def figures(table: pd.DataFrame, *, recommended: str | None = None) -> list[go.Figure]:
    """All figures, in the order in which they are read."""
    by = deciding(set(table["measure"]))
    shown = [heat_map(table, by, recommended=recommended), heat_map(table, "kl", recommended=recommended)]
    shown += [outcome_maps(table), rank_curves(table, by), rank_curves(table, "kl")]
    return [*shown, trade_off(table, recommended=recommended)]


def heat_map(table: pd.DataFrame, measure: str, *, recommended: str | None = None) -> go.Figure:
    """Layers × ranks: the cell minus random subspaces of its shape, with a star where Holm's test excludes chance."""
    rows = _labelled(table, measure)
    grid = rows.pivot_table(index="label", columns="rank", values="difference", sort=False)
    grid = grid.reindex(index=_ordered(rows), columns=sorted(rows["rank"].unique()))
    by_place = rows.set_index(["label", "rank"])
    texts = [[_text(by_place, label, rank, recommended) for rank in grid.columns] for label in grid.index]
    limit, bar = _scale(grid.to_numpy())
    fig = figure(
        f"{MEASURES[measure]}: gradient subspace minus random ones of its shape",
        "rank (directions kept per block; layers counted from 0)",
        "layers",
        says="nats per token; blue: lower than random. * Holm p < 0.05 over all cells"
        + ("; ▢ recommended" if recommended else ""),
    )
    fig.add_trace(
        go.Heatmap(
            z=grid.astype(object).where(grid.notna(), None).to_numpy(),
            x=[str(rank) for rank in grid.columns],
            y=[plain(str(label)) for label in grid.index],
            text=texts,
            texttemplate="%{text}",
            colorscale=DIVERGING,
            zmid=0,
            zmin=-limit,
            zmax=limit,
            xgap=2,
            ygap=2,
            colorbar=bar,
            hovertemplate="layers %{y}, rank %{x}<br>minus random: %{z:.4f} nats<extra></extra>",
            hoverongaps=False,
        )
    )
    fig.update_xaxes(type="category")
    fig.update_yaxes(type="category", autorange="reversed")
    fig.update_layout(height=200 + 40 * len(grid))
    return fig


def outcome_maps(table: pd.DataFrame) -> go.Figure:
    """Every loss side by side, a panel of layers × ranks each: the cell minus random subspaces of its shape."""
    fields = [field for field in LOSS_FIELDS if field in set(table["measure"])]
    fig = panels(
        [MEASURES[field] for field in fields], "Every loss: gradient subspace minus random ones of its shape",
        "rank", "layers", says="nats per token; blue: lower than random. * Holm p < 0.05 over all cells of the loss",
    )  # fmt: skip
    for i, field in enumerate(fields):
        rows = _labelled(table, field)
        by_place = rows.set_index(["label", "rank"])
        labels, ranks = _ordered(rows), sorted(rows["rank"].unique())
        grid = rows.pivot_table(index="label", columns="rank", values="difference").reindex(labels, columns=ranks)
        fig.add_heatmap(
            z=grid.astype(object).where(grid.notna(), None).to_numpy(),
            x=[str(rank) for rank in ranks], y=[plain(str(label)) for label in labels],
            text=[[_text(by_place, label, rank, None) for rank in ranks] for label in labels], texttemplate="%{text}",
            coloraxis="coloraxis", xgap=1, ygap=1, hoverongaps=False,
            hovertemplate="layers %{y}, rank %{x}<br>minus random: %{z:.4f} nats<extra></extra>", **panel(i),
        )  # fmt: skip
    limit, bar = _scale(table.loc[table["measure"].isin(fields), "difference"].to_numpy())
    fig.update_layout(coloraxis={"colorscale": DIVERGING, "cmin": -limit, "cmax": limit, "colorbar": bar})
    fig.update_xaxes(type="category")
    fig.update_yaxes(type="category", autorange="reversed")
    n_panel_rows = -(-len(fields) // 2)
    fig.update_layout(height=160 + n_panel_rows * (110 + 26 * table["cell"].nunique() // max(1, len(ranks))))
    return fig


def rank_curves(table: pd.DataFrame, measure: str) -> go.Figure:
    """A panel per choice of layers: change from the base model against rank, with the range of random subspaces."""
    rows = _labelled(table, measure)
    labels = _ordered(rows)
    columns = min(5, len(labels))
    extents = rows.groupby("label")[["low", "high", "random_low", "random_high"]].agg(["min", "max"]).abs().max(axis=1)
    one_scale = bool(extents.max() <= 4 * extents.median())
    scales = "" if one_scale else " Every panel has a scale of its own"
    n_rows = math.ceil(len(labels) / columns)
    fig = make_subplots(
        rows=n_rows,
        cols=columns,
        shared_yaxes="all" if one_scale else False,
        subplot_titles=[plain(_heading(label)) for label in labels],
        vertical_spacing=0.3 / n_rows,
        horizontal_spacing=0.03 if one_scale else 0.05,
        figure=figure(
            f"{MEASURES[measure]} against rank, change from the base model",
            "",
            "",
            says="bands: 95 % interval over items; for random subspaces, the range of the draws. "
            f"Full rank is the model itself: 0.{scales}",
        ),
    )
    for i, label in enumerate(labels):
        part = rows[rows["label"] == label].sort_values("rank")
        end = pd.DataFrame({"rank": [part["width"].iloc[0]]} | dict.fromkeys(_CURVES, [0.0]))
        part = pd.concat([part[["rank", *_CURVES]], end])
        ranks, here = part["rank"], panel(i)
        band(fig, ranks, part["random_low"], part["random_high"], null=True, **here)
        band(fig, ranks, part["low"], part["high"], **here)
        name = "random subspaces of the same ranks"
        line(fig, ranks, part["random"], name, null=True, showlegend=i == 0, **here)
        line(fig, ranks, part["value"], "gradient subspace", showlegend=i == 0, **here)
    fig.update_xaxes(title_text="rank per block", row=n_rows)
    fig.update_xaxes(range=[0, 1.04 * float(rows["width"].max())], title_standoff=5)
    fig.update_yaxes(title_text="nats per token", col=1)
    for i in range(len(labels), n_rows * columns):  # panels without a curve
        fig.update_xaxes(visible=False, row=n_rows, col=i % columns + 1)
        fig.update_yaxes(visible=False, row=n_rows, col=i % columns + 1)
    fig.update_layout(height=190 + 210 * n_rows, legend={"y": -0.4 / n_rows, "yanchor": "top"}, margin={"t": 125})
    return fig


def trade_off(table: pd.DataFrame, *, recommended: str | None = None) -> go.Figure:
    """The loss that decides against damage: what is better than random lies below the grey points at the same KL."""
    by = deciding(set(table["measure"]))
    loss, kl = _labelled(table, by), _labelled(table, "kl").set_index("cell")
    fig = figure(
        f"Change of {MEASURES[by]} against damage",
        "KL from the base model on gold completions (nats per token)",
        f"change of {MEASURES[by]} (nats per token)",
        says="each point a cell, or the mean of its random subspaces: what lies below the grey points at the same KL "
        "is better than random at equal damage",
    )
    fig.add_hline(y=0, line={"color": NULL_COLOR, "width": 1})
    hover = "%{customdata}<br>KL %{x:.3f}, loss %{y:+.3f}<extra></extra>"
    line(
        fig, kl.loc[loss["cell"], "random"], loss["random"], "random subspaces", null=True, size=8, mode="markers",
        customdata=loss["name"].map(plain), hovertemplate=f"random, as {hover}",
    )  # fmt: skip
    for i, label in enumerate(_ordered(loss)):
        part = loss[loss["label"] == label]
        line(
            fig, kl.loc[part["cell"], "value"], part["value"], plain(_heading(label)), index=i, size=10,
            mode="markers", customdata=part["name"].map(plain), hovertemplate=hover,
        )  # fmt: skip
    if recommended is not None:
        row = loss.set_index("cell").loc[recommended]
        fig.add_annotation(
            x=math.log10(max(float(kl.loc[recommended, "value"]), 1e-6)),
            y=row["value"],
            text="recommended",
            arrowhead=2,
        )
    fig.update_xaxes(type="log", dtick="D2")
    fig.update_layout(height=560)
    return fig


_CURVES = ("value", "low", "high", "random", "random_low", "random_high")


def _labelled(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Rows of one measure, with a label that says all but the rank and leaves out what is the same everywhere."""
    rows = table[table["measure"] == measure].copy()
    parts = [rows["layers"].astype(str)]
    for column, shown in (("kind", "{}"), ("head", "head {}"), ("projector", "{}")):
        if rows[column].nunique() > 1:
            parts.append(rows[column].astype(str).str.replace("_", " ").map(shown.format))
    rows["label"] = parts[0].str.cat(parts[1:], sep=", ") if len(parts) > 1 else parts[0]
    rows["name"] = rows["label"] + ", rank " + rows["rank"].astype(str)
    return rows


def _ordered(rows: pd.DataFrame) -> list[str]:
    """Single layers in order of depth, then sets of layers."""
    labels = rows.drop_duplicates("label")
    single = labels["layer"].astype(str).str.isdigit()
    depth = labels["layer"].where(single, "0").astype(int)
    order = labels.assign(many=~single, depth=depth).sort_values(["many", "depth"], kind="stable")
    return list(order["label"])


def _scale(values: np.ndarray) -> tuple[float, dict[str, Any]]:
    """End of the colour scale, and its bar: the largest value, unless a few would leave all others without colour."""
    sizes = np.abs(values[~np.isnan(values)])
    largest, most = float(sizes.max()), float(np.quantile(sizes, 0.8))
    capped = largest > 3 * most > 0
    text = "nats (colours end here)" if capped else "nats"
    return (most if capped else largest) or 1.0, {"title": {"text": text, "side": "right"}}


def _heading(label: str) -> str:
    """A label that reads as a heading: bare block indices do not."""
    if not label[0].isdigit():
        return label
    return f"layers {label}" if label.split(", ")[0].count(",") else f"layer {label}"


def _text(rows: pd.DataFrame, label: str, rank: int, recommended: str | None) -> str:
    if (label, rank) not in rows.index:
        return ""
    row = rows.loc[(label, rank)]
    star = "*" if row["p_holm"] < ALPHA else ""
    box = "▢ " if recommended is not None and row["cell"] == recommended else ""
    return f"{box}{row['difference']:+.3f}{star}"
