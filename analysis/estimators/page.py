"""The page: outcomes of every entrant with intervals, the report, and what base, paper, random and best write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from spd_lens.analysis.common import NULL_COLOR, as_data, bars, drawn, html_of, line, panel, panels, plain
from spd_lens.analysis.estimators.report import LOSSES
from spd_lens.analysis.estimators.settings import RANDOM
from spd_lens.analysis.estimators.tables import BASE
from spd_lens.evaluation import OUTCOMES


def figures(table: pd.DataFrame, says: str = "bars: 95 % intervals over items and draws") -> Iterator[go.Figure]:
    """For every place and rank: the change of each loss from the base model, a panel per loss, random ones in grey.

    `says` stands below the title.
    """
    changes = table[(table.against == BASE) & table.outcome.isin(LOSSES)]
    for (place, rank), part in changes.groupby(["place", "rank"], sort=False):
        there = [name for name in LOSSES if name in set(part.outcome)]
        fig = panels(
            [OUTCOMES[name] for name in there], f"Change from base at equal KL: {plain(place)}, rank {rank}",
            "nats per token", "", columns=len(there), says=says,
        )  # fmt: skip
        for n, name in enumerate(there):
            rows = part[part.outcome == name]
            for is_null in (False, True):
                own = rows[(rows.estimator == RANDOM) == is_null]
                labels = own.estimator if is_null else own.estimator + "<br><sub>" + own.span + "</sub>"
                line(
                    fig, own.value, labels, name, null=is_null, mode="markers", size=9, showlegend=False,
                    error_x=bars(own.value, own.low, own.high), **panel(n),
                )  # fmt: skip
        fig.add_vline(x=0, line={"color": NULL_COLOR, "width": 1, "dash": "dot"}, row="all", col="all")
        fig.update_xaxes(matches=None)
        fig.update_yaxes(autorange="reversed")
        fig.update_layout(height=220 + 40 * part.groupby(["estimator", "span"]).ngroups)
        yield fig


def contest_page(report: str, table: pd.DataFrame, cards: Sequence[dict[str, Any]]) -> str:
    """Figures, report and completions as one HTML page that needs no network."""
    title, _, rest = report.partition("\n\n")
    first, _, tabled = rest.partition("\n## ")
    return drawn(
        "contest.html", "figures.js", title=title.removeprefix("# "), before=html_of(first),
        after=html_of(f"## {tabled}"), figures=[as_data(fig) for fig in figures(table)], cards=cards,
    )  # fmt: skip
