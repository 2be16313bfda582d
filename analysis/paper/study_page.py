"""`report.html` of a study: its Markdown report as a page, with the differences drawn."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from spd_lens.analysis.common import (
    LOSS_FIELDS,
    NULL_COLOR,
    SYMBOLS,
    bars,
    figure,
    html_of,
    line,
    page,
    panel,
    panels,
    plain,
)
from spd_lens.evaluation import OUTCOMES
from spd_lens.files import write_text
from spd_lens.study import BASE, FOCUS, PHASES, RANDOM, Evidence, Report

_ROOM = {"height": 460, "margin": {"l": 80, "r": 20, "t": 120, "b": 60}}
"""Room for titles of two lines with a note under them."""


def write_page(folder: str | Path, report: Report | None = None) -> Path:
    """Write `report.html` into a study's folder, finished or not.

    Args:
        folder: The study's folder.
        report: Its report, if that was made already.

    Raises:
        SPDError: The folder has no results.
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
    """For every source and phase: losses against base and random directions, loss against KL, accuracy, side effects.

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
        side = own[(own.role == "side effect") & (own.measure == "completion loss")]
        found += [
            losses_figure(target, BASE, f"Every loss against the base model{where}"),
            losses_figure(target, RANDOM, f"Every loss against random directions{where}"),
            trade_figure(rows, deciding_loss(target), f"What was gained, and how much changed for it{where}"),
            differences_figure(target[target.measure == "accuracy"], BASE, f"Accuracy against the base model{where}"),
            differences_figure(side, BASE, f"Side effects: loss on texts that were not meant to change{where}"),
        ]
    return [fig for fig in found if fig.data]


def deciding_loss(table: pd.DataFrame) -> pd.DataFrame:
    """Of `differences`, the rows of the loss that decides on each target: on results where it has any."""
    by_target = table.groupby("target").measure.agg(set)
    results = by_target.map(lambda measures: OUTCOMES["results_loss"] in measures)
    wanted = table.target.map(results.map({True: OUTCOMES["results_loss"], False: OUTCOMES["aligned_loss"]}))
    return table[table.measure == wanted]


def losses_figure(table: pd.DataFrame, reference: str, title: str) -> go.Figure:
    """Differences of every method to one reference, a panel for each loss: no single one is what a method does."""
    part = table[table.reference == reference]
    found = [OUTCOMES[field] for field in LOSS_FIELDS if OUTCOMES[field] in set(part.measure)]
    says = "bars: 95 % interval over items, seeds averaged"
    fig = panels(found or [""], title, "", "difference (nats per token)", says=says)
    for i, measure in enumerate(found):
        _draw_differences(fig, part[part.measure == measure], first=i == 0, **panel(i))
    fig.add_hline(y=0, line={"color": NULL_COLOR, "width": 1, "dash": "dot"})
    fig.update_layout(margin={"t": 150}, height=240 + 280 * -(-len(found) // 2))
    return fig


def differences_figure(table: pd.DataFrame, reference: str, title: str) -> go.Figure:
    """Differences of every method to one reference, with intervals, side by side for every target.

    Controls are grey and open; targets differ in symbol. `table` holds rows of `differences` of one measure.
    """
    part = table[table.reference == reference]
    unit = "share of items" if next(iter(part.measure), "") == "accuracy" else "nats per token"
    fig = figure(title, "", f"difference ({unit})", says="bars: 95 % interval over items, seeds averaged")
    _draw_differences(fig, part)
    fig.add_hline(y=0, line={"color": NULL_COLOR, "width": 1, "dash": "dot"})
    fig.update_layout(**_ROOM)
    return fig


def _draw_differences(fig: go.Figure, part: pd.DataFrame, first: bool = True, **axes: str) -> None:
    """A point with its interval for every method and target; those of the first panel alone are in the legend."""
    for index, target in enumerate(dict.fromkeys(part.target)):
        own = part[(part.target == target) & part.value.notna()]
        controls = own.method.map(_is_control)
        for grey, rows in own.groupby(controls):
            line(
                fig, rows.method.map(plain), rows.value, plain(target), index=index, null=bool(grey), mode="markers",
                size=9, symbol=_symbol(index, bool(grey)), error_y=bars(rows.value, rows.low, rows.high),
                legendgroup=target, offsetgroup=target, showlegend=first and bool(grey == controls.min()), **axes,
                customdata=[f"corrected p = {row.p_holm:.2g}, {row.verdict}" for row in rows.itertuples()],
                hovertemplate="%{x}: %{y:.3g}<br>%{customdata}<extra>" + plain(target) + "</extra>",
            )  # fmt: skip
    fig.update_layout(scattermode="group", scattergap=0.6, legend={"title": {"text": "measured on  "}})
    fig.update_xaxes(categoryorder="array", categoryarray=[plain(method) for method in dict.fromkeys(part.method)])


def trade_figure(averages: pd.DataFrame, loss: pd.DataFrame, title: str) -> go.Figure:
    """Change of the loss that decides from base against KL from base: a point per method and target."""
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
        line(
            fig, x.value, own.value, plain(method), index=index, null=grey, size=10,
            error_x=bars(x.value, x.low, x.high), error_y=bars(own.value, own.low, own.high),
            mode="markers+text" if len(targets) == 1 else "markers", text=[plain(method)] * len(own),
            textposition="top center", customdata=[plain(f"{row.target}, {row.measure}") for row in own.itertuples()],
            hovertemplate="%{customdata}: KL %{x:.3g}, change %{y:.3g}",
        )  # fmt: skip
        symbols = [_symbol(targets.index(target), grey) for target in own.target]
        fig.data[-1].update(marker={"symbol": symbols}, textfont={"color": fig.data[-1].line.color})
    for index, target in enumerate(targets if len(targets) > 1 else []):
        line(fig, [None], [None], f"on {plain(target)}", null=True, symbol=_symbol(index), size=10, mode="markers")
    fig.update_layout(legend={"y": -0.34}, **_ROOM)
    if fig.data:
        fig.add_hline(y=0, line={"color": NULL_COLOR, "width": 1, "dash": "dot"})
    return fig


def _is_control(method: str) -> bool:
    return method.startswith(f"{FOCUS}-")


def _symbol(index: int, grey: bool = False) -> str:
    return SYMBOLS[index % len(SYMBOLS)] + ("-open" if grey else "")
