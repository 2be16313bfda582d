"""Where in the text the gradient sits: on the answer, the operands, the worked steps or the template; and how much of
it the subspace holds.

`∂ loss / ∂ K` and `∂ loss / ∂ V` at a token say how much the loss would move if that token's key or value did. Only
tokens before the last scored one can matter (position `t - 1` predicts token `t`), so shares are compared with the
share of *those* tokens that fall into a category, and with the same prompts carrying the answers of other examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import typer
from einops import rearrange
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from spd_lens.analysis.common import COLORS, NULL_COLOR, Findings, Subject, analysis, bars, figure, place
from spd_lens.analysis.tokens.categories import CATEGORIES, categories
from spd_lens.analysis.tokens.page import text_page
from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.files import write_text
from spd_lens.models import Loss, ModelPair, neutrally
from spd_lens.output import terminal
from spd_lens.sites import Site
from spd_lens.stats import bracketed, mean_interval, paired_difference
from spd_lens.subspaces import Subspace, shuffled_answers, token_gradients

_OF = {False: "all tokens", True: "without the first token"}


@neutrally
def token_energy(
    pair: ModelPair,
    examples: Sequence[Example],
    subspace: Subspace,
    *,
    loss: Loss = "aligned",
    engine: str = "lens",
    max_calibration_tokens: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Squared gradient norm of every token at every site of the subspace, and the part of it inside the subspace.

    Args:
        pair: The model.
        examples: Examples with completion and spans.
        subspace: The subspace whose sites are looked at, joint or per head.
        loss: The loss that is differentiated, as in `extract`.
        engine: The model that is run, as in `extract`.
        max_calibration_tokens: Tokens behind which a text is cut, as in `extract`; None: it is taken whole.
        progress: Whether to show a progress bar.

    Returns:
        One row per example, token and site: `example`, `position`, `category`, `scored`, `reachable` (whether the loss
        can depend on this token's keys and values at all), `energy` = `‖g‖²`, and `inside` = `‖P g‖²`, both in
        squared nats per unit of activation. Summed over rows of a site, `energy` is the trace of its moments.
    """
    sites = subspace.sites
    read = categories(examples, pair.format, loss)
    frames = []
    for rows in token_gradients(
        pair, examples, layers=sorted({s.layer for s in sites}), kinds=sorted({s.kind for s in sites}), loss=loss,
        engine=engine, max_calibration_tokens=max_calibration_tokens, progress=progress,
    ):  # fmt: skip
        names = read[rows.index][1][: len(rows.encoded.ids)]
        scored, last = set(rows.encoded.scored), max(rows.encoded.scored)
        common = {
            "example": rows.index,
            "id": examples[rows.index].id,
            "position": range(len(names)),
            "category": names,
            "scored": [t in scored for t in range(len(names))],
            "reachable": [t < last for t in range(len(names))],
        }
        for site in sites:
            g = rows.gradient[site].cpu()
            energy, inside = g.square().sum(1).numpy(), _inside(g, subspace, site).numpy()
            where = place(site, 0, per_head=False)
            frames.append(pd.DataFrame({**common, **where, "energy": energy, "inside": inside}))
    return pd.concat(frames).sort_values("example", kind="stable", ignore_index=True)


def category_shares(
    energy: pd.DataFrame, null: pd.DataFrame | None = None, *, skip_first: bool = False, seed: int = 0
) -> pd.DataFrame:
    """How much of the gradient energy each category holds, against its share of the tokens.

    Each example counts the same, and intervals are bootstraps over examples (`spd_lens.stats.intervals`).

    Args:
        energy: What `token_energy` gave.
        null: What `token_energy` gave for examples with shuffled answers: what prompts and format alone attract.
        skip_first: Leave the first token out of all shares: it holds most of the energy in models with attention sinks.
        seed: Seed of the bootstrap.

    Returns:
        One row per site (and `all`: the energies of all sites added), category and measure, with `value, low, high`
        and `of`, which says what the shares are of. Measures: `energy` (share of `Σ ‖g‖²`), `tokens` (share of the
        reachable tokens, the null), `excess` (their paired difference), `shuffled` (energy share under shuffled
        answers), `specific` (energy share minus that, paired per example), `inside` (share of the category's energy
        that the subspace holds).
    """
    if not len(energy):
        raise SPDError("there are no tokens to sum up; give at least one example")
    if skip_first:
        energy = energy[energy["position"] > 0]
        null = None if null is None else null[null["position"] > 0]
    rows = []
    for site, part in [("all", energy), *energy.groupby("site", sort=False)]:
        layer, kind = ("all", "all") if site == "all" else part.iloc[0][["layer", "kind"]]
        where = {"site": site, "layer": layer, "kind": kind, "head": "all", "of": _OF[skip_first]}
        shares, tokens, inside = _tables(part)
        wrong = None if null is None else _tables(null if site == "all" else null[null["site"] == site])[0]
        for name in [c for c in CATEGORIES if c in tokens and (tokens[c] > 0).any()]:
            measures = {
                "energy": mean_interval(shares[name], seed=seed),
                "tokens": mean_interval(tokens[name], seed=seed),
                "excess": paired_difference(tokens[name], shares[name], seed=seed),
            }
            if wrong is not None:
                other = wrong[name] if name in wrong else shares[name] * 0
                measures["shuffled"] = mean_interval(other, seed=seed)
                measures["specific"] = paired_difference(other, shares[name], seed=seed)
            if len(held := inside[name].dropna()):
                measures["inside"] = mean_interval(held, seed=seed)
            rows += [{**where, "category": name, "measure": m, **e.to_row()} for m, e in measures.items()]
    return pd.DataFrame(rows).astype({"low": float, "high": float})  # NaN where one example gives no interval


def share_figure(shares: pd.DataFrame, site: str = "all", *, skip_first: bool = False) -> go.Figure:
    """Bars: each category's share of the gradient energy beside its share of the tokens."""
    part = shares[(shares["site"] == site) & (shares["of"] == _OF[skip_first])]
    where = "all sites of the run" if site == "all" else f"site {site}"
    fig = figure(
        f"Where the gradient sits, {where}, {_OF[skip_first]}",
        "share of an example's total, mean over examples (0 to 1)",
        "",
        says="grey: what each category would hold if every token pulled alike, and with the answers of other examples",
    )
    looks = {
        "tokens": ("tokens (null)", NULL_COLOR, "."),
        "shuffled": ("gradient energy, shuffled answers (null)", NULL_COLOR, "/"),
        "energy": ("gradient energy", COLORS[0], ""),
    }
    names = [name for name in CATEGORIES if name in set(part["category"])][::-1]
    for measure, (label, color, shape) in looks.items():
        rows = part[part["measure"] == measure].set_index("category")
        if len(rows):
            rows = rows.loc[names]
            pattern = {"shape": shape, "fillmode": "overlay", "fgcolor": "#ffffff", "size": 6}
            error = bars(rows["value"], rows["low"], rows["high"], thickness=1.2, width=3)
            fig.add_bar(
                y=names, x=rows["value"], name=label, orientation="h", marker={"color": color, "pattern": pattern},
                error_x=error,
            )  # fmt: skip
    fig.update_layout(barmode="group", height=180 + 62 * len(names), legend_traceorder="reversed", bargap=0.25)
    fig.update_layout(legend={"y": 1.0, "yanchor": "bottom", "x": 0}, margin_t=120)
    return fig


def say(energy: pd.DataFrame, shares: pd.DataFrame) -> str:
    """What the numbers show, in sentences; `shares` with and without the first token."""
    every, rest = (
        shares[(shares["site"] == "all") & (shares["of"] == of)].pivot(
            index="category", columns="measure", values=["value", "low", "high"]
        )
        for of in (_OF[False], _OF[True])
    )
    sentences = []
    if "first token" in every.index:
        sentences.append(
            f"The first token alone holds {every['value']['energy']['first token']:.0%} of the gradient energy "
            f"(share of the tokens: {every['value']['tokens']['first token']:.1%}). The rest:"
        )
    for order, word in ((False, "More"), (True, "Less")):
        sure = rest["low"]["excess"] > 0 if word == "More" else rest["high"]["excess"] < 0
        names = rest["value"]["excess"][sure].sort_values(ascending=order).index
        found = [f"{n} {rest['value']['energy'][n]:.0%} ({rest['value']['tokens'][n]:.0%})" for n in names]
        if found:
            sentences.append(f"{word} of the energy than of the tokens (in brackets): {', '.join(found)}.")
    if "specific" in rest["value"]:
        value, low, high = (rest[end]["specific"] for end in ("value", "low", "high"))
        moved = value[(low > 0) | (high < 0)].sort_values(key=abs, ascending=False)
        changes = [f"{name} {change * 100:+.1f}" for name, change in moved.items()]
        sentences.append(
            "With right answers instead of those of other examples, in points of the rest's energy: "
            f"{', '.join(changes)}."
            if changes
            else "With answers of other examples the shares are the same within noise: they are not about being right."
        )
    beyond = energy.loc[~energy["reachable"], "energy"]
    sentences.append(
        f"{len(beyond)} token-site pairs at or after the last scored token cannot matter; "
        + ("their gradients are exactly zero, as they must be." if not beyond.any() else "NOT all of them are zero.")
    )
    return " ".join(filter(None, sentences))


@analysis()
def main(
    subject: Subject,
    *,
    n: Annotated[int | None, typer.Option(help="Calibration examples; all of the run's if not given.")] = None,
    shuffled: Annotated[
        bool, typer.Option(help="Also with shuffled answers, the null, by a second extraction.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of the shuffle and of the bootstrap.")] = 0,
) -> Findings:
    """Where in the text the gradient sits, and how much of it the subspace holds; a page with coloured text."""
    config, examples = subject.run.config, subject.calibration(n)
    measure = partial(
        token_energy, subject.pair, subspace=subject.subspace, loss=config.loss, engine=config.engine,
        max_calibration_tokens=config.max_calibration_tokens, progress=subject.progress,
    )  # fmt: skip
    energy = measure(examples)
    null, without = None, ""
    if shuffled:
        try:
            wrong = shuffled_answers(examples, seed)
        except SPDError as error:
            without = f" There is no null of shuffled answers: {error}."
        else:
            null = measure(wrong)
    shares = pd.concat([category_shares(energy, null, skip_first=s, seed=seed) for s in (False, True)])
    says = say(energy, shares) + without
    facts: dict[str, Any] = {
        "examples": len(examples), "loss": config.loss, "seed": seed, "units": "energy: (nats per unit)²",
    }  # fmt: skip
    subject.save("tokens-by-token", energy, **facts)
    figures = [share_figure(shares), share_figure(shares, skip_first=True)]
    figures += [share_figure(shares, str(site), skip_first=True) for site in subject.subspace.sites]
    written = subject.save("tokens", shares, figures, says=says, **facts)
    most = config.max_calibration_tokens
    read = [tokens[:most] for tokens, _ in categories(examples, subject.pair.format, config.loss)]
    page = text_page(subject.name, read, examples, energy, shares, says=says, model=config.model)
    written.append(write_text(subject.folder / "tokens-text.html", page))
    return Findings(_table(subject.name, shares), says, written)


def _inside(g: Float[Tensor, "token width"], subspace: Subspace, site: Site) -> Float[Tensor, " token"]:
    """`‖P g‖²`, from the coordinates in the basis, which is orthonormal."""
    basis = subspace.bases[site]
    blocks = rearrange(g, "token (block width) -> block token width", block=basis.shape[0])
    return (blocks @ basis).square().sum(dim=(0, 2))


def _tables(part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Per example (rows) and category: share of the energy, share of the reachable tokens, share inside."""
    reachable = part[part["reachable"]]
    by = reachable.groupby(["example", "category"])
    energy = by["energy"].sum().unstack(fill_value=0.0)
    inside = by["inside"].sum().unstack(fill_value=0.0) / energy.where(energy > 0)
    tokens = by.size().unstack(fill_value=0)
    return (
        energy.div(energy.sum(axis=1).replace(0, np.nan), axis=0).fillna(0.0),
        tokens.div(tokens.sum(axis=1), axis=0),
        inside,
    )


def _table(name: str, shares: pd.DataFrame) -> Table:
    table = []
    part = shares[(shares["site"] == "all") & (shares["of"] == _OF[False])]
    for category in part["category"].unique():
        rows = part[part["category"] == category].set_index("measure")
        cells = [
            bracketed(*rows.loc[m, ["value", "low", "high"]]) if m in rows.index else "–"
            for m in ("energy", "tokens", "shuffled", "inside")
        ]
        table.append([category, *(cell.replace("[", "\\[") for cell in cells)])
    head = ["category", "energy", "tokens (null)", "shuffled (null)", "inside subspace"]
    return terminal(head, table, title=f"tokens · {name}")
