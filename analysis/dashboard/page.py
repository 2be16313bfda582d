"""The page: data, script and plotly in one file, which makes no request but to its own app."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from spd_lens.analysis.common import drawn

Look = Literal["page", "embedded"]


def page(
    document: Mapping[str, Any], *, title: str, look: Look = "page", playground: Mapping[str, Any] | None = None
) -> str:
    """A self-contained HTML page of a document that `document` made.

    Its policy forbids all requests; the page of the live app may ask the app.

    Args:
        document: What the views show.
        title: Heading of the page.
        look: `"embedded"` has no margins, for a notebook's output.
        playground: What the form of the live app offers; with it, the page begins with a tab that generates.
    """
    scripts = ["dashboard.js", "views.js", "texts.js", *(["playground.js"] if playground else [])]
    return drawn("dashboard.html", *scripts, document=document, title=title, look=look, playground=playground)
