"""Draw the scaling curves of docs/scaling.md: `PYTHONPATH=. python scripts/curves_figure.py`.

It reads what `make bench BENCH_ARGS='--only curves --out benchmarks/results/curves.json'` wrote, and needs the extra
`dev` and a Chromium on the path.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from scripts.render_notebooks import draw
from spd_lens.analysis.common import COLORS, DASHES, SYMBOLS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "curves.json"
PICTURE = ROOT / "docs" / "images" / "scaling-curves.svg"
UNITS = {"time": "processor seconds", "peak memory": "peak memory, MiB"}
SIZES = {
    "examples": "examples", "tokens": "tokens a text", "layers": "layers", "width": "width", "rank": "rank",
}  # fmt: skip


def figure(rows: list[dict[str, Any]]) -> go.Figure:
    """Time above memory, a column for what grows, a line for each stage; both axes are logarithmic."""
    fig = make_subplots(
        rows=len(UNITS), cols=len(SIZES), shared_xaxes="columns", shared_yaxes="rows", horizontal_spacing=0.02,
        vertical_spacing=0.06,
    )  # fmt: skip
    stages = list(dict.fromkeys(row["what"].partition(":")[0] for row in rows))
    for row in rows:
        stage, measure, axis = re.fullmatch(r"(\w+): ([\w ]+) by (\w+)", row["what"]).groups()  # type: ignore[union-attr]
        at = list(UNITS).index(measure) + 1, list(SIZES).index(axis) + 1
        sizes, values = zip(*row["points"], strict=True)
        n = stages.index(stage)
        look = {"color": COLORS[n], "dash": DASHES[n]}
        fig.add_scatter(
            x=sizes, y=values, name=stage, legendgroup=stage, showlegend=at == (1, 1), mode="lines+markers", line=look,
            marker={"symbol": SYMBOLS[n], "size": 7}, row=at[0], col=at[1],
        )  # fmt: skip
        fig.update_xaxes(type="log", tickvals=sizes, row=at[0], col=at[1])
    for n, title in enumerate(UNITS.values(), start=1):
        fig.update_yaxes(title=title, row=n, col=1)
    fig.update_yaxes(type="log", dtick=1)
    for n, title in enumerate(SIZES.values(), start=1):
        fig.update_xaxes(title=title, row=len(UNITS), col=n)
    fig.update_layout(
        template="spd_light", width=1180, height=620, paper_bgcolor="white", margin={"t": 20, "b": 90},
        legend={"y": -0.16},
    )  # fmt: skip
    return fig


def main() -> None:
    """Write the picture as SVG."""
    found = figure(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"])
    (address,) = draw([found.to_plotly_json()])
    PICTURE.write_text(urllib.parse.unquote(address.partition(",")[2]), encoding="utf-8")


if __name__ == "__main__":
    main()
