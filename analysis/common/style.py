"""How every figure looks: one template, colours that colour-blind readers tell apart, pages that need no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from spd_lens.output import render, source

PACKAGE = "spd_lens.analysis"
"""Whose `templates/` hold the pages of the analyses."""

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


_GRID = "#d0d7de"
_AXIS = {"gridcolor": _GRID, "zerolinecolor": _GRID, "linecolor": _GRID, "ticks": "outside", "automargin": True}
pio.templates["spd_light"] = go.layout.Template(
    layout=go.Layout(
        colorway=COLORS,
        font={"family": "system-ui, sans-serif", "size": 14, "color": "#1f2328"},
        title={"x": 0, "xanchor": "left", "font": {"size": 17}},
        # transparent, so that a page's light or dark ground shows through; a page gives figures its own ink as well
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis=_AXIS,
        yaxis=_AXIS,
        legend={"orientation": "h", "yanchor": "top", "y": -0.2, "x": 0},
        margin={"l": 70, "r": 20, "t": 70, "b": 60},
        hovermode="closest",
        colorscale={"sequential": SEQUENTIAL, "diverging": DIVERGING},
    )
)


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


def line(
    fig: go.Figure, x: Any, y: Any, name: str, *, index: int = 0, null: bool = False, symbol: str = "", size: int = 7,
    **trace: Any,
) -> None:  # fmt: skip
    """Add a line; its colour, dash and symbol follow from `index`, or say that it is a null."""
    color, dash = (NULL_COLOR, "dot") if null else (_nth(COLORS, index), _nth(DASHES, index))
    shape = symbol or ("circle-open" if null else _nth(SYMBOLS, index))
    marker = {"color": color, "symbol": shape, "size": size}
    for axis in trace.keys() & {"error_x", "error_y"}:
        trace[axis] = trace[axis] and {"color": color, **trace[axis]}
    kind = {"mode": "lines+markers", **trace}
    fig.add_trace(go.Scatter(x=x, y=y, name=name, line={"color": color, "dash": dash}, marker=marker, **kind))


def band(fig: go.Figure, x: Any, low: Any, high: Any, *, index: int = 0, null: bool = False, **trace: Any) -> None:
    """Add an interval as a pale band, without an entry in the legend; add it before its line."""
    color = NULL_COLOR if null else _nth(COLORS, index)
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    edge = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip", **trace}
    fig.add_trace(go.Scatter(x=x, y=high, **edge))
    fig.add_trace(go.Scatter(x=x, y=low, fill="tonexty", fillcolor=f"rgba({red},{green},{blue},0.2)", **edge))


def bars(value: pd.Series, low: pd.Series, high: pd.Series, **look: Any) -> dict[str, Any]:
    """Intervals as plotly's error bars; no bar where there is no interval."""
    up, down = (end.fillna(0.0).clip(lower=0.0) for end in (high - value, value - low))
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, **look}


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
    return drawn(
        "figures.html", "figures.js", title=title, says=says, facts=listed(facts), before=before, after=after,
        figures=[as_data(fig) for fig in figures],
    )  # fmt: skip


def drawn(template: str, *scripts: str, **context: Any) -> str:
    """A page whose figures are drawn in the browser by plotly, by what all scripts share, and by `scripts`."""
    script = "\n".join(source(name, PACKAGE) for name in ("base.js", *scripts))
    return render(template, package=PACKAGE, scripts=(plotly_script(), script), **context)


def listed(facts: Mapping[str, Any] | None) -> list[str]:
    """Settings as the short texts under a page's title."""
    return [f"{key}: {value}" for key, value in (facts or {}).items()]


def as_data(fig: go.Figure) -> dict[str, Any]:
    """A figure as plotly.js takes it."""
    data: dict[str, Any] = json.loads(pio.to_json(fig))
    return data


@cache
def plotly_script() -> str:
    """plotly.js as it goes into a page; a browser hashes it with plain line feeds."""
    script: str = get_plotlyjs()
    return script.replace("\r\n", "\n").replace("\r", "\n")


def plain(text: str) -> str:
    """Text for labels and hovers: plotly reads tags in them, and what comes from data or a model is not trusted."""
    return escape(text, quote=False).replace("\n", "<br>")
