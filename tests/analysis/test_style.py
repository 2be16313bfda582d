"""The look of figures: nulls in grey, colour never alone, pages that need no network and let nothing in."""

from __future__ import annotations

import re

import plotly.graph_objects as go
import pytest

from spd_lens.analysis.common.style import (
    COLORS,
    DASHES,
    NULL_COLOR,
    SYMBOLS,
    band,
    figure,
    line,
    page,
    panel,
    panels,
    plain,
)


def test_figures_have_titles_and_no_ground_of_their_own() -> None:
    fig = figure("Energy", "rank (directions)", "share", says="what to see")
    assert fig.layout.xaxis.title.text == "rank (directions)" and fig.layout.yaxis.title.text == "share"
    assert "what to see" in fig.layout.title.text
    assert fig.layout.template.layout.paper_bgcolor == "rgba(0,0,0,0)"


def test_lines_differ_in_more_than_colour() -> None:
    fig = figure("t", "x", "y")
    for index in range(6):
        line(fig, [1, 2], [3, 4], f"line {index}", index=index)
    looks = {(trace.line.dash, trace.marker.symbol) for trace in fig.data}
    assert len(looks) == 6 and len({trace.line.color for trace in fig.data}) == 6
    line(fig, [1, 2], [3, 4], "beyond the palette", index=len(COLORS) * len(DASHES) * len(SYMBOLS))
    assert fig.data[-1].line.color == COLORS[0]


def test_nulls_are_grey_and_dotted() -> None:
    fig = figure("t", "x", "y")
    band(fig, [1, 2], [0.1, 0.1], [0.3, 0.3], null=True)
    line(fig, [1, 2], [0.2, 0.2], "random", null=True, index=3)
    upper, lower, mean = fig.data
    assert mean.line.color == NULL_COLOR and mean.line.dash == "dot" and mean.marker.symbol == "circle-open"
    assert lower.fill == "tonexty" and lower.fillcolor == "rgba(138,138,138,0.2)"
    assert list(upper.y) == [0.3, 0.3] and list(lower.y) == [0.1, 0.1]
    assert not upper.showlegend and not lower.showlegend


def test_panels_share_axes_and_title_the_outer_ones() -> None:
    fig = panels(["a", "b", "c"], "Title", "x (unit)", "y (unit)")
    for n in range(3):
        line(fig, [1], [n], "same", showlegend=n == 0, **panel(n))
        band(fig, [1], [0], [1], **panel(n))
    assert [trace.xaxis for trace in fig.data[::3]] == ["x", "x2", "x3"]
    assert [note.text for note in fig.layout.annotations] == ["a", "b", "c"]
    assert (fig.layout.xaxis.title.text, fig.layout.xaxis3.title.text) == (None, "x (unit)")
    assert (fig.layout.yaxis.title.text, fig.layout.yaxis2.title.text) == ("y (unit)", None)
    one = panels(["a"], "Title", "x", "y", columns=1)
    assert one.layout.xaxis.title.text == "x" and one.layout.yaxis.title.text == "y"


def test_pages_are_self_contained_and_escape_what_they_are_given() -> None:
    fig = figure("t", "x", "y")
    line(fig, [1], [2], plain("<script>alert(1)</script>"))
    html = page("a <b>", [fig, go.Figure()], says="1 < 2 & 3", facts={"run": "<img src=x>", "title": "@FIGURES@"})
    assert "<title>a &lt;b&gt;</title>" in html and "1 &lt; 2 &amp; 3" in html
    assert "<img src=x>" not in html and "alert(1)</script>" not in html
    assert "title: @FIGURES@" in html  # what fills a slot is no slot
    outside = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"<[^>]*(src|href)\s*=", outside)
    assert html.count('class="plotly-graph-div"') == 2
    assert "prefers-color-scheme: dark" in html


@pytest.mark.parametrize(("text", "shown"), [("a\nb", "a<br>b"), ("<i>", "&lt;i&gt;"), ("'\"&", "'\"&amp;")])
def test_plain_text(text: str, shown: str) -> None:
    assert plain(text) == shown
