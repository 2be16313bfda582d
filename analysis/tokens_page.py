"""The text of every calibration example, each token as dark as its gradient is large: a page without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

import numpy as np
import pandas as pd

from spd_lens.audit.core import Piece
from spd_lens.examples import Example

from .reading import document, safe, token

_MOST_SITES = 12
"""Beyond that the page offers the sums over keys and over values only; numbers per site are in the table."""


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
        name: Of the run.
        read: Each example's tokens in order of position.
        examples: The examples, in the order of the frame's `example` numbers.
        energy: What `tokens.token_energy` gave for them.
        shares: What `tokens.category_shares` gave for that.
        says: The findings, in sentences.
        model: Name of the model.
    """
    views = _views(energy)
    radios = "".join(
        f'<label><input type="radio" name="site" id="s{i}"{" checked" if not i else ""}>{safe(label)}</label>'
        for i, label in enumerate(views)
    )
    style = files("spd_lens.analysis").joinpath("tokens.css").read_text(encoding="utf-8") + "".join(
        f"body:has(#s{i}:checked):has(#norm:checked) pre span {{ --w: var(--n{i}) }}\n"
        f"body:has(#s{i}:checked):has(#part:checked) pre span {{ --w: var(--p{i}) }}\n"
        for i in range(len(views))
    )
    bar = (
        f'<div class="bar-top"><fieldset><legend>site</legend>{radios}</fieldset>'
        "<fieldset><legend>colour</legend>"
        '<label><input type="radio" name="what" id="norm" checked>gradient norm, of the example’s largest behind the '
        "first token</label>"
        '<label><input type="radio" name="what" id="part">part of it inside the subspace</label></fieldset>'
        '<span>0 <span class="ramp"></span> 1 · <b style="box-shadow: inset 0 -2px">bold</b>: more than 5 % of the '
        'example’s energy · <span style="outline:1.5px dashed var(--minus)">dashed</span>: scored</span></div>'
    )
    cards = "\n".join(
        _card(examples[index], read[index], part, views) for index, part in energy.groupby("example", sort=True)
    )
    facts = [f"{len(examples)} calibration examples", f"run {name}", model, "hover a token for its numbers"]
    return document(
        "Where the gradient sits, token by token", _summary(shares) + bar + cards, says=says, facts=facts,
        style=style,
    )  # fmt: skip


def _views(energy: pd.DataFrame) -> dict[str, list[str]]:
    """What the reader chooses between: label → sites that are summed."""
    sites = list(dict.fromkeys(energy["site"]))
    kinds = {kind: [s for s in sites if s.endswith(f".{kind}")] for kind in dict.fromkeys(energy["kind"])}
    views = {"all": sites}
    if len(sites) > len(kinds) > 1:
        views |= {f"all {kind.upper()}": members for kind, members in kinds.items()}
    if 1 < len(sites) <= _MOST_SITES:
        views |= {f"layer {site.replace('.', ' ')}": [site] for site in sites}
    return views


def _card(example: Example, tokens: Sequence[Piece], part: pd.DataFrame, views: dict[str, list[str]]) -> str:
    tables = {what: part.pivot(index="position", columns="site", values=what) for what in ("energy", "inside")}
    category = part.drop_duplicates("position").set_index("position")["category"]
    styles = [""] * len(tokens)
    for i, sites in enumerate(views.values()):
        energy, inside = (tables[what][sites].sum(axis=1).to_numpy() for what in ("energy", "inside"))
        # the first token, an attention sink, would leave all others white
        largest = energy[1:].max(initial=0.0) or energy.max()
        norm = np.sqrt(energy / largest).clip(0, 1) if largest > 0 else energy
        kept = np.divide(inside, energy, out=np.zeros_like(inside), where=energy > 0)
        for position in range(len(tokens)):
            if norm[position] >= 0.005:
                styles[position] += f"--n{i}:{norm[position]:.2f};--p{i}:{kept[position]:.2f};"
    total = tables["energy"].sum(axis=1)
    share = (total / total.sum()).to_numpy() if total.sum() > 0 else total.to_numpy()
    kept = np.divide(
        tables["inside"].sum(axis=1).to_numpy(), total.to_numpy(), out=np.zeros(len(tokens)), where=total.to_numpy() > 0
    )
    spans = "".join(
        token(
            piece,
            classes=" ".join(filter(None, ("s" if piece.scored else "", "top" if share[i] > 0.05 else ""))),
            style=styles[i],
            title=f"{category[i]} · position {i} · {share[i]:.2%} of the energy · {kept[i]:.0%} inside",
        )
        for i, piece in enumerate(tokens)
    )
    inside_all = tables["inside"].to_numpy().sum() / total.sum() if total.sum() > 0 else 0.0
    most = int(np.argmax(share))
    return (
        f'<article class="card"><header><h3>{safe(example.id)}</h3><span class="size">{len(tokens)} tokens · '
        f"<b>{inside_all:.0%}</b> of the energy inside the subspace · most on position {most} "
        f"<b>{safe(repr(tokens[most].text))}</b> ({share[most]:.0%})</span></header><pre>{spans}</pre></article>"
    )


def _summary(shares: pd.DataFrame) -> str:
    part = shares[(shares["site"] == "all") & (shares["of"] == shares["of"].iloc[0])]
    table = part.pivot(index="category", columns="measure", values="value")
    order = list(dict.fromkeys(part["category"]))
    widest = max(table["energy"].max(), table["tokens"].max(), 1e-9)
    rows = []
    for name in order:
        energy, tokens = table["energy"][name], table["tokens"][name]
        rows.append(
            f'<span>{safe(name)}</span><span class="pair"><div class="e" style="width:{energy / widest:.1%}"></div>'
            f'<div class="t" style="width:{tokens / widest:.1%}"></div></span>'
            f'<span class="n">{energy:.1%} of energy, {tokens:.1%} of tokens</span>'
        )
    return (
        '<section class="panel"><p class="note" style="margin-top:0"><span class="key" style="background:var(--bar)">'
        '</span> share of the gradient energy, all sites · <span class="key" style="background:repeating-linear-'
        'gradient(45deg, var(--null) 0 3px, transparent 3px 5px)"></span> share of the tokens that can matter (null); '
        "means over examples, intervals in tokens.html</p>"
        f'<div class="bars">{"".join(rows)}</div></section>'
    )
