"""Layer × head maps with a click-through: what a head's queries attend to on an example. One page, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from spd_lens.analysis.common import as_data, drawn, listed
from spd_lens.analysis.heads.attention import Attention


def heads_page(
    title: str,
    figures: Sequence[go.Figure],
    shown: Attention,
    *,
    says: str = "",
    facts: Mapping[str, Any] | None = None,
) -> str:
    """The page as HTML.

    Args:
        title: Heading of the page.
        figures: Maps of `analysis.heads`: each heat map's `meta` is its kind, x the layer, y the head.
        shown: The example to click through.
        says: The findings, in sentences.
        facts: Settings of the analysis, shown under the findings.
    """
    return drawn(
        "heads.html", "heads.js", title=title, says=says, facts=listed(facts),
        maps=[as_data(fig) for fig in figures], example=shown.record(),
    )  # fmt: skip
