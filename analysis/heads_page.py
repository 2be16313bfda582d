"""Layer × head maps with a click-through: what a head's queries attend to on an example. One page, no network."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

from .attention import Attention
from .reading import safe


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
    folder = files("spd_lens.analysis")

    def read(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    slots = {
        "TITLE": safe(title),
        "SAYS": safe(says),
        "FACTS": " · ".join(f"{safe(key)}: {safe(value)}" for key, value in (facts or {}).items()),
        "STYLE": read("reading.css") + read("heads.css"),
        "PLOTLY": get_plotlyjs(),
        "SCRIPT": read("heads.js"),
        "MAPS": _json([json.loads(pio.to_json(fig)) for fig in figures]),
        "EXAMPLE": _json(shown.record()),
        "INKS": _json({name: pio.templates[f"spd_{name}"].layout.font.color for name in ("light", "dark")}),
    }
    # in one pass: what fills one slot may itself look like another
    return re.sub(r"@([A-Z]+)@", lambda slot: slots[slot.group(1)], read("heads.html"))


def _json(value: Any) -> str:
    """JSON for a script element: no text in it can end the element or begin another."""
    return json.dumps(value, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
