"""`report.html` of a study: its Markdown report as a page, with the differences drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from markdown_it import MarkdownIt

from spd_lens.analysis.common import COLORS, NULL_COLOR, SYMBOLS, figure, page, plain
from spd_lens.files import write_text
from spd_lens.study import BASE, FOCUS, PHASES, RANDOM, Evidence, Report

_ROOM = {"height": 460, "margin": {"l": 80, "r": 20, "t": 120, "b": 60}}
"""For titles of two lines with a note under them."""


def write_page(folder: str | Path, report: Report | None = None) -> Path:
    """Write `report.html` into a study's folder, finished or not.

    Args:
        folder: The study's folder.
        report: Its report, where that was made already.

    Raises:
        SPDError: the folder has no results.
    """
    report = report or Report(Evidence.read(folder))
    title, _, rest = report.text.partition("\n\n")
    first = min((rest.find(f"## {name}") for name in PHASES.values() if f"## {name}" in rest), default=len(rest))
    html = page(
        title.removeprefix("# ").replace("`", ""), figures(report.means, report.differences),
        before=html_of(rest[:first]), after=html_of(rest[first:]),
    )  # fmt: skip
    return write_text(Path(folder) / "report.html", html)


def figures(averages: pd.DataFrame, table: pd.DataFrame) -> list[go.Figure]:
    """For every source and phase: loss against base and random directions, loss against KL, accuracy, side effects.

    Args:
        averages: `spd_lens.study.reporting.differences.means` of a study.
        table: `spd_lens.study.reporting.differences.differences` of the same.
    """
    found = []
    for source, phase in averages[["source", "phase"]].drop_duplicates().itertuples(index=False, name=None):
        rows, own = (t[(t.source == source) & (t.phase == phase)] for t in (averages, table))
        if own.empty:
            continue
        where = f"<br>{PHASES[phase]}, source {plain(source)}"
        target = own[own.role == "target"]
        loss = target[target.measure == "aligned loss"]
        side = own[(own.role == "side effect") & (own.measure == "completion loss")]
        found += [
            differences_figure(loss, BASE, f"Aligned loss against the base model{where}"),
            differences_figure(loss, RANDOM, f"Aligned loss against random directions{where}"),
            trade_figure(rows, loss, f"What was gained, and how much changed for it{where}"),
            differences_figure(target[target.measure == "accuracy"], BASE, f"Accuracy against the base model{where}"),
            differences_figure(side, BASE, f"Side effects: loss on texts that were not meant to change{where}"),
        ]
    return [fig for fig in found if fig.data]


def differences_figure(table: pd.DataFrame, reference: str, title: str) -> go.Figure:
    """Differences of every method to one reference, with intervals, side by side for every target.

    Controls are grey and open; targets differ in symbol. `table` holds rows of `differences` of one measure.
    """
    part = table[table.reference == reference]
    unit = "share of items" if next(iter(part.measure), "") == "accuracy" else "nats per token"
    fig = figure(title, "", f"difference ({unit})", says="bars: 95 % interval over items, seeds averaged")
    order = list(dict.fromkeys(part.method))
    for index, target in enumerate(dict.fromkeys(part.target)):
        own = part[part.target == target].set_index("method").reindex(order)
        _points(fig, order, own, str(target), index)
    fig.add_hline(y=0, line={"color": NULL_COLOR, "width": 1, "dash": "dot"})
    fig.update_layout(scattermode="group", scattergap=0.6, legend={"title": {"text": "measured on  "}}, **_ROOM)
    fig.update_xaxes(categoryorder="array", categoryarray=order)
    return fig


def trade_figure(averages: pd.DataFrame, loss: pd.DataFrame, title: str) -> go.Figure:
    """Change of the aligned loss from base against KL from base: a point per method and target."""
    fig = figure(title, "KL from base (nats per token)", "change of loss (nats)",
                 says="down: better; right: further from the base model; bars: 95 % intervals over items")  # fmt: skip
    kl = averages[(averages.measure == "KL from base") & (averages.role == "target")].set_index(["target", "method"])
    change = loss[loss.reference == BASE]
    targets = list(dict.fromkeys(change.target))
    for index, method in enumerate(dict.fromkeys(change.method)):
        own = change[change.method == method]
        own = own[[(target, method) in kl.index for target in own.target]]
        x = kl.loc[[(target, method) for target in own.target]] if len(own) else own
        grey = _is_control(method)
        color = NULL_COLOR if grey else COLORS[index % len(COLORS)]
        symbols = [SYMBOLS[targets.index(t) % len(SYMBOLS)] + ("-open" if grey else "") for t in own.target]
        fig.add_trace(
            go.Scatter(
                x=x.value, y=own.value, name=plain(method), mode="markers+text" if len(targets) == 1 else "markers",
                text=[plain(method)] * len(own), textposition="top center", textfont={"color": color},
                customdata=[plain(t) for t in own.target],
                marker={"color": color, "symbol": symbols, "size": 10},
                error_x=_bars(x, color), error_y=_bars(own, color),
                hovertemplate="%{customdata}: KL %{x:.3g}, change %{y:.3g}",
            )
        )  # fmt: skip
    for index, target in enumerate(targets if len(targets) > 1 else []):
        symbol = {"color": NULL_COLOR, "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 10}
        fig.add_trace(go.Scatter(x=[None], y=[None], mode="markers", name=f"on {plain(target)}", marker=symbol))
    fig.update_layout(legend={"y": -0.34}, **_ROOM)
    if fig.data:
        fig.add_hline(y=0, line={"color": NULL_COLOR, "width": 1, "dash": "dot"})
    return fig


def html_of(markdown: str) -> str:
    """HTML of a report's Markdown. HTML in it is text, and there are no links and no images."""
    # only cells of tables need their bars escaped
    lines = [line if line.startswith("|") else line.replace("\\|", "|") for line in markdown.split("\n")]
    rules = ["link", "image", "autolink", "reference", "html_block", "html_inline"]
    html = MarkdownIt("commonmark", {"html": False}).enable("table").disable(rules).render("\n".join(lines))
    return html.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")


def _points(fig: go.Figure, order: Sequence[str], own: pd.DataFrame, target: str, index: int) -> None:
    """One target's points: methods in colour, controls grey and open, in one legend group."""
    symbol = SYMBOLS[index % len(SYMBOLS)]
    first = True
    for grey in (False, True):
        chosen = [method for method in order if _is_control(method) == grey]
        rows = own.loc[chosen]
        if rows.value.notna().sum() == 0:
            continue
        color = NULL_COLOR if grey else COLORS[index % len(COLORS)]
        fig.add_trace(
            go.Scatter(
                x=chosen, y=[None if v != v else v for v in rows.value], name=plain(target), legendgroup=target,
                showlegend=first, offsetgroup=target, mode="markers", error_y=_bars(rows, color),
                marker={"color": color, "symbol": symbol + ("-open" if grey else ""), "size": 9},
                customdata=[_hover(row) for row in rows.to_dict("records")],
                hovertemplate="%{x}: %{y:.3g}<br>%{customdata}<extra>" + plain(target) + "</extra>",
            )
        )  # fmt: skip
        first = False


def _hover(row: dict[str, Any]) -> str:
    return "" if row["value"] != row["value"] else f"corrected p = {row['p_holm']:.2g}, {row['verdict']}"


def _bars(rows: pd.DataFrame, color: str) -> dict[str, Any]:
    """Interval ends as plotly wants them; no bar where there is no interval."""
    up, down = ((rows.high - rows.value).fillna(0.0), (rows.value - rows.low).fillna(0.0))
    return {"type": "data", "array": list(up), "arrayminus": list(down), "color": color, "thickness": 1.5}


def _is_control(method: str) -> bool:
    return method.startswith(f"{FOCUS}-")
