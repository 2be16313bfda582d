"""A change of the score as stacked components, and the effects of the factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd
import plotly.graph_objects as go

from spd_lens.analysis.common import COLORS, NULL_COLOR, bars, line, panel, panels, plain
from spd_lens.analysis.gain.completions import COMPONENTS, FINAL
from spd_lens.analysis.gain.factorial import OUTCOMES
from spd_lens.study import BASE

_PATTERNS = ("", "/", "x")
_A_ROW = 3
"""Panels side by side."""
NAMES = {"rest": "the rest (final answer)", "format": "format", "stopping": "stopping"}


def split_figures(table: pd.DataFrame) -> Iterator[go.Figure]:
    """For every study, source and scorer: components stacked, and each with its interval.

    The final-answer rules are drawn where they are the study's own: all of a change is the rest under them.

    Args:
        table: From `split`.
    """
    trained = table[table.method != BASE]
    for (study, source, scorer), part in trained.groupby(["study", "source", "scorer"], sort=False):
        if scorer == FINAL and not part.own.iloc[0]:
            continue
        own = ", the study's own" if part.own.iloc[0] else ""
        where = f"{plain(study)}, source {plain(source)}, scorer {scorer}{own}"
        yield stacked(part, f"What the change of the score is made of<br>{where}")
        yield dodged(part, f"Each component with its interval<br>{where}")


def stacked(part: pd.DataFrame, title: str) -> go.Figure:
    """Bars of the components of every method, which add up to the diamond; its bar is the interval of the sum."""
    fig, rows_of = _by_target(
        part, title, "change (points)", "components add up to the diamond, whose bar is a 95 % interval"
    )
    for n, rows in enumerate(rows_of):
        for index, name in enumerate(COMPONENTS):
            own = rows[rows.quantity == name]
            look = {"color": COLORS[index], "pattern": {"shape": _PATTERNS[index]}}
            fig.add_bar(
                x=own.method, y=100 * own.gain, name=NAMES[name], marker=look, legendgroup=name, showlegend=n == 0,
                hovertemplate=f"%{{x}}: {name} %{{y:+.1f}}<extra></extra>", **panel(n),
            )  # fmt: skip
        own = rows[rows.quantity == "score"]
        error = bars(100 * own.gain, 100 * own.gain_low.astype(float), 100 * own.gain_high.astype(float))
        line(
            fig, own.method, 100 * own.gain, "the whole change", index=7, mode="markers", symbol="diamond", size=10,
            error_y=error, legendgroup="score", showlegend=n == 0, **panel(n),
        )  # fmt: skip
    fig.update_layout(barmode="relative", bargap=0.5)
    return fig


def dodged(part: pd.DataFrame, title: str) -> go.Figure:
    """Points of the components of every method, side by side, with intervals."""
    fig, rows_of = _by_target(part, title, "change (points)", "bars: 95 % intervals over items, seeds averaged")
    for n, rows in enumerate(rows_of):
        for index, name in enumerate(COMPONENTS):
            own = rows[rows.quantity == name]
            error = bars(100 * own.gain, 100 * own.gain_low.astype(float), 100 * own.gain_high.astype(float))
            line(
                fig, own.method, 100 * own.gain, NAMES[name], index=index, mode="markers", size=9, error_y=error,
                offsetgroup=name, legendgroup=name, showlegend=n == 0, **panel(n),
            )  # fmt: skip
    fig.update_layout(scattermode="group", scattergap=0.5)
    return fig


def effect_figures(effects: pd.DataFrame) -> Iterator[go.Figure]:
    """For every source and outcome: the effects of factors and of pairs of them, a panel per target, three a figure.

    Args:
        effects: From `effect_table`.
    """
    for outcome in (name for name in OUTCOMES if name != "score"):
        for source, part in effects[effects.outcome == outcome].groupby("source", sort=False):
            targets = list(dict.fromkeys(part.target))
            for start in range(0, len(targets), _A_ROW):
                yield _effects(part, outcome, source, targets[start : start + _A_ROW])


def _effects(part: pd.DataFrame, outcome: str, source: str, targets: Sequence[str]) -> go.Figure:
    """The effects on one outcome, in the order of the first target."""
    factor, unit = (1, "tokens") if outcome == "tokens" else (100, "points")
    part = part.assign(label=[f"{row.effect}<br><sub>{row.contrast}</sub>" for row in part.itertuples()])
    own = [part[part.target == target] for target in targets]
    order = list(dict.fromkeys(label for rows in own for label in rows.label))
    fig = panels(
        [plain(target) for target in targets], f"What moves `{outcome}`, source {plain(source)}", f"effect ({unit})",
        "", columns=len(targets), says="largest first; bars: 95 % intervals over items",
    )  # fmt: skip
    for n, rows in enumerate(own):
        value, low, high = (factor * rows[name].astype(float) for name in ("value", "low", "high"))
        look = {"mode": "markers", "size": 9, "showlegend": False, "error_x": bars(value, low, high)}
        line(fig, value, rows.label, outcome, **look, **panel(n))
    fig.add_vline(x=0, line={"color": NULL_COLOR, "width": 1, "dash": "dot"}, row="all", col="all")
    fig.update_layout(height=250 + 44 * len(order), margin={"t": 130, "b": 80})
    fig.update_yaxes(categoryorder="array", categoryarray=order[::-1])
    return fig


def _by_target(part: pd.DataFrame, title: str, y: str, says: str) -> tuple[go.Figure, list[pd.DataFrame]]:
    """Panels for the targets, with room for names of methods on the slant, and the rows of each."""
    targets = list(dict.fromkeys(part.target))
    columns = min(2, len(targets))
    fig = panels([plain(target) for target in targets], title, "", y, columns=columns, says=says)
    height = fig.layout.height + 130
    fig.update_layout(height=height, margin={"t": 155, "b": 145}, legend={"y": -115 / (height - 300)})
    return fig, [part[part.target == target] for target in targets]
