"""The text of every calibration example, each token as dark as its gradient is large: a page without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from spd_lens.analysis.common import PACKAGE
from spd_lens.examples import Example
from spd_lens.output import render
from spd_lens.spans import Piece

_MOST_SITES = 12
"""Of more sites than this, the page offers only the sums over keys and over values; the table has each."""


def text_page(
    name: str,
    read: Sequence[Sequence[Piece]],
    examples: Sequence[Example],
    energy: pd.DataFrame,
    shares: pd.DataFrame,
    *,
    says: str = "",
    model: str = "",
) -> str:
    """The page as HTML.

    Args:
        name: Name of the run.
        read: Each example's tokens in order of position.
        examples: The examples, in the order of the frame's `example` numbers.
        energy: What `tokens.token_energy` gave for them.
        shares: What `tokens.category_shares` gave for that.
        says: The findings, in sentences.
        model: Name of the model.
    """
    views = _views(energy)
    part = shares[(shares["site"] == "all") & (shares["of"] == shares["of"].iloc[0])]
    table = part.pivot(index="category", columns="measure", values="value")
    return render(
        "tokens.html", package=PACKAGE, title="Where the gradient sits, token by token", says=says, views=views,
        facts=[f"{len(examples)} calibration examples", f"run {name}", model, "hover a token for its numbers"],
        categories=[(c, table["energy"][c], table["tokens"][c]) for c in dict.fromkeys(part["category"])],
        widest=max(table["energy"].max(), table["tokens"].max(), 1e-9),
        cards=[_card(examples[i], read[i], own, views) for i, own in energy.groupby("example", sort=True)],
    )  # fmt: skip


def _views(energy: pd.DataFrame) -> dict[str, list[str]]:
    """What the reader chooses between: the sites that are summed, by label."""
    sites = list(dict.fromkeys(energy["site"]))
    kinds = {kind: [s for s in sites if s.endswith(f".{kind}")] for kind in dict.fromkeys(energy["kind"])}
    views = {"all": sites}
    if len(sites) > len(kinds) > 1:
        views |= {f"all {kind.upper()}": members for kind, members in kinds.items()}
    if 1 < len(sites) <= _MOST_SITES:
        views |= {f"layer {site.replace('.', ' ')}": [site] for site in sites}
    return views


def _card(example: Example, tokens: Sequence[Piece], part: pd.DataFrame, views: dict[str, list[str]]) -> dict[str, Any]:
    tables = {what: part.pivot(index="position", columns="site", values=what) for what in ("energy", "inside")}
    category = part.drop_duplicates("position").set_index("position")["category"]
    styles = [""] * len(tokens)
    for i, sites in enumerate(views.values()):
        energy, inside = (tables[what][sites].sum(axis=1).to_numpy() for what in ("energy", "inside"))
        # the first token, an attention sink, would leave all others white
        largest = energy[1:].max(initial=0.0) or energy.max()
        norm = np.sqrt(energy / largest).clip(0, 1) if largest > 0 else energy
        kept = _ratio(inside, energy)
        for position in (norm >= 0.005).nonzero()[0]:
            styles[position] += f"--n{i}:{norm[position]:.2f};--p{i}:{kept[position]:.2f};"
    total, inside = (tables[what].sum(axis=1).to_numpy() for what in ("energy", "inside"))
    share, kept = _ratio(total, total.sum()), _ratio(inside, total)
    classes = ["s " * piece.scored + "top" * bool(share[i] > 0.05) for i, piece in enumerate(tokens)]
    most = int(np.argmax(share))
    return {
        "id": example.id, "inside": f"{_ratio(inside.sum(), total.sum()):.0%}", "most": most,
        "most_token": repr(tokens[most].text),
        "most_share": f"{share[most]:.0%}",
        "tokens": [
            (piece, classes[i].strip(), styles[i],
             f"{category[i]} · position {i} · {share[i]:.2%} of the energy · {kept[i]:.0%} inside")
            for i, piece in enumerate(tokens)
        ],
    }  # fmt: skip


def _ratio(part: Any, whole: Any) -> Any:
    """`part / whole`, and 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=np.asarray(whole) > 0)
