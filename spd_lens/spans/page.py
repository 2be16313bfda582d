"""The span audit as one HTML page without scripts, fonts or images. The filters are check boxes and CSS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from spd_lens.files import write_text
from spd_lens.output import render
from spd_lens.spans.core import KINDS, Audit, Bin
from spd_lens.spans.terminal import amount, between, bin_name, inside, place_name

_RULES = {
    "overlap": "Scored tokens are those that the loss looks at: the tokens that overlap a span of characters which "
    "decide correctness. Numbers above bars are examples; one with several scored tokens is spread over them.",
    "inside": "Scored tokens are those that the loss looks at: the tokens that lie wholly inside a span of characters "
    "which decide correctness. Numbers above bars are examples; one with several scored tokens is spread over them.",
    "full": "The full loss scores every token of the completion. Spans are not looked at.",
}


def write_page(path: str | Path, found: Audit, *, title: str, facts: Sequence[str] = ()) -> Path:
    """Write the page; `SPDError` where that is not possible."""
    return write_text(path, page(found, title=title, facts=facts))


def page(found: Audit, *, title: str, facts: Sequence[str] = ()) -> str:
    """The page as HTML. `facts` stand under the title: model, split, seed."""
    rule = found.span_rule if found.loss == "aligned" else found.loss
    return render(
        "spans.html", title=title, facts=facts, says=_RULES[rule], tiles=list(_tiles(found)),
        charts=_charts(found), flags=[(KINDS[kind], *counts) for kind, counts in found.flag_counts().items()],
        suspicious=len(found.suspicious), examples=found.examples, place_name=place_name,
    )  # fmt: skip


def _tiles(found: Audit) -> Iterator[tuple[str, str]]:
    """The numbers on top of the page, each with what it is."""
    total, sizes = len(found.examples), found.sizes
    yield f"{len(sizes)} of {total}", "examples have scored tokens"
    if sizes:
        spread = f"({min(sizes)}\xa0to\xa0{max(sizes)})" if min(sizes) < max(sizes) else "(in every example)"
        yield f"{median(sizes):g}", f"median |S|, scored tokens per example {spread}"
    if found.paper_sizes and found.share_in_paper_sizes is not None:
        said = f"of examples have the paper's |S|, {between(found.paper_sizes)} (table 6)"
        yield f"{found.share_in_paper_sizes:.0%}", said
    if found.share_copied:
        yield f"{found.share_copied:.0%}", "of the scored tokens can be copied from earlier in the completion"
    yield f"{len(found.suspicious)} of {total}", "are suspicious"


def _charts(found: Audit) -> list[dict[str, Any]]:
    if not found.sizes:
        return []
    paper = found.paper_sizes
    band = f" (shaded: table 6, {between(paper)})" if paper else ""
    charts = [_chart(f"Scored tokens per example, |S|{band}", found.size_bins(), paper)]
    if bins := found.place_bins():
        charts.append(_chart("Where in the completion they lie, in % of its tokens", bins, None))
    return charts


def _chart(title: str, bins: Sequence[Bin], paper: tuple[int, int] | None) -> dict[str, Any]:
    """A bar chart as the template draws it, with the places of its bars."""
    width, height, top, foot = 480, 170, 18, 22
    step, most, floor = width / len(bins), max(bar.count for bar in bins), height - foot
    thick, bars = min(step * 0.72, 56), []
    for i, bar in enumerate(bins):
        middle, tall = (i + 0.5) * step, (floor - top) * bar.count / most
        places = {
            "left": i * step, "step": step, "x": middle - thick / 2, "y": floor - tall, "thick": thick, "tall": tall,
            "middle": middle, "above": floor - tall - 5,
        }  # fmt: skip
        bars.append(
            {name: f"{place:.1f}" for name, place in places.items()}
            | {"in_paper": inside(bar, paper), "name": bin_name(bar).removesuffix(" %")}
            | {"amount": amount(bar) if bar.count else ""}
        )
    spoken = "; ".join(f"{bin_name(bar)}: {amount(bar)}" for bar in bins)
    return {"title": title, "width": width, "height": height, "floor": floor, "spoken": spoken, "bars": bars}
