"""How every figure looks: one template, colours that colour-blind readers tell apart, pages that need no network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#666666")
"""Okabe and Ito's palette without yellow and black, which vanish on white and on black. Never the only distinction:
lines also differ in dash, points in symbol."""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "triangle-down", "star")
SEQUENTIAL = "Cividis"
"""For amounts: even in lightness, and the same to people with any colour vision."""
DIVERGING = "RdBu_r"
"""For signed amounts, with its middle at 0: blue below, red above."""
NULL_COLOR = "#8A8A8A"
"""Every control and every null is grey and dotted, in every figure."""


def _template(ink: str, grid: str) -> go.layout.Template:
    axis = {"gridcolor": grid, "zerolinecolor": grid, "linecolor": grid, "ticks": "outside", "automargin": True}
    return go.layout.Template(
        layout=go.Layout(
            colorway=COLORS,
            font={"family": "system-ui, sans-serif", "size": 14, "color": ink},
            title={"x": 0, "xanchor": "left", "font": {"size": 17}},
            # transparent, so that a page's light or dark ground shows through
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            xaxis=axis,
            yaxis=axis,
            legend={"orientation": "h", "yanchor": "top", "y": -0.2, "x": 0},
            margin={"l": 70, "r": 20, "t": 70, "b": 60},
            hovermode="closest",
            colorscale={"sequential": SEQUENTIAL, "diverging": DIVERGING},
        )
    )


pio.templates["spd_light"] = _template("#1f2328", "#d0d7de")
pio.templates["spd_dark"] = _template("#e6edf3", "#3d444d")


def figure(title: str, x: str, y: str, *, says: str = "") -> go.Figure:
    """An empty figure. Axis titles carry their units; `says` is a line under the title: what to see in it."""
    text = f"{title}<br><sub>{says}</sub>" if says else title
    return go.Figure(layout={"template": "spd_light", "title": {"text": text}, "xaxis_title": x, "yaxis_title": y})


def panels(titles: Sequence[str], title: str, x: str, y: str, *, columns: int = 2, says: str = "") -> go.Figure:
    """Several small figures that share their axes. Add to the n-th, from 0, with `**panel(n)`."""
    rows = -(-len(titles) // columns)
    fig = make_subplots(
        rows=rows, cols=columns, subplot_titles=list(titles), shared_xaxes="all", shared_yaxes="all",
        horizontal_spacing=0.04, vertical_spacing=0.12 if rows < 3 else 0.08,
    )  # fmt: skip
    base = figure(title, "", "", says=says).layout
    fig.update_layout(template=base.template, title=base.title, height=140 + 280 * rows)
    fig.update_layout(margin={"t": 110}, legend={"y": -0.32 / rows})
    for n in range(rows * columns):  # titles at the outer axes alone
        axes = panel(n)
        if n >= (rows - 1) * columns:
            fig.layout[axes["xaxis"].replace("x", "xaxis")].title = x
        if n % columns == 0:
            fig.layout[axes["yaxis"].replace("y", "yaxis")].title = y
    return fig


def panel(n: int) -> dict[str, str]:
    """The axes of the n-th panel, from 0."""
    number = str(n + 1) if n else ""
    return {"xaxis": f"x{number}", "yaxis": f"y{number}"}


def line(fig: go.Figure, x: Any, y: Any, name: str, *, index: int = 0, null: bool = False, **trace: Any) -> None:
    """Add a line; its colour, dash and symbol follow from `index`, or say that it is a null."""
    color, dash = (NULL_COLOR, "dot") if null else (_nth(COLORS, index), _nth(DASHES, index))
    marker = {"symbol": "circle-open" if null else _nth(SYMBOLS, index), "size": 7}
    kind = {"mode": "lines+markers", **trace}
    fig.add_trace(go.Scatter(x=x, y=y, name=name, line={"color": color, "dash": dash}, marker=marker, **kind))


def band(fig: go.Figure, x: Any, low: Any, high: Any, *, index: int = 0, null: bool = False, **trace: Any) -> None:
    """Add an interval as a pale band, without an entry in the legend; add it before its line."""
    color = NULL_COLOR if null else _nth(COLORS, index)
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    edge = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip", **trace}
    fig.add_trace(go.Scatter(x=x, y=high, **edge))
    fig.add_trace(go.Scatter(x=x, y=low, fill="tonexty", fillcolor=f"rgba({red},{green},{blue},0.2)", **edge))


def _nth(values: Sequence[str], index: int) -> str:
    return values[index % len(values)]


def page(
    title: str,
    figures: Sequence[go.Figure],
    *,
    says: str = "",
    facts: Mapping[str, Any] | None = None,
    before: str = "",
    after: str = "",
) -> str:
    """Figures on one HTML page with plotly inside: works from `file://`, light or dark as the reader's system is.

    `before` and `after` are HTML around the figures, whose author has escaped what is in it; the rest is plain text.
    """
    parts = [
        pio.to_html(fig, full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True})
        for fig in figures
    ]
    shown = " · ".join(f"{escape(str(key))}: {escape(str(value))}" for key, value in (facts or {}).items())
    slots = {
        "TITLE": escape(title),
        "SAYS": escape(says),
        "FACTS": shown,
        "FIGURES": "\n".join([before, *parts, after]),
        "DARK": pio.templates["spd_dark"].layout.font.color,
        "PLOTLY": get_plotlyjs(),
    }
    # in one pass: what fills one slot may itself look like another
    return re.sub(r"@([A-Z]+)@", lambda slot: slots[slot.group(1)], _PAGE)


def plain(text: str) -> str:
    """Text for labels and hovers: plotly reads tags in them, and what comes from data or a model is not trusted."""
    return escape(text, quote=False).replace("\n", "<br>")


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  background: #fff; color: #1f2328; }
.facts { color: #656d76; font-size: .85rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #d0d7de; padding: .25rem .6rem; text-align: left; vertical-align: top; }
@media (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #e6edf3; } .facts { color: #9198a1; } th, td { border-color: #3d444d; }
}
</style>
<script>@PLOTLY@</script></head>
<body><h1>@TITLE@</h1><p>@SAYS@</p>
@FIGURES@
<p class="facts">@FACTS@</p>
<script>
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function recolor() {
  const ink = dark.matches ? "@DARK@" : "#1f2328", grid = dark.matches ? "#3d444d" : "#d0d7de";
  for (const plot of document.querySelectorAll(".plotly-graph-div")) {
    const change = {"font.color": ink};
    for (const key of Object.keys(plot.layout)) if (/^[xy]axis\\d*$/.test(key)) {
      change[key + ".gridcolor"] = grid; change[key + ".zerolinecolor"] = grid;
    }
    Plotly.relayout(plot, change);
  }
}
recolor(); dark.addEventListener("change", recolor);
</script></body></html>
"""
