"""Where in the model: gradient energy of every KV head, and what projecting that head alone does, as layer × head maps.

Energy says how much the loss would move with a head's keys or values; ablation says what a projection of that head does
to held-out text while every other head is left alone. Neither says much without its null: energy is compared with
the same prompts carrying other answers, ablation with random subspaces of the same rank in the same head.
"""

from __future__ import annotations

from typing import Annotated, Any

import pandas as pd
import plotly.graph_objects as go
import torch
import typer
from jaxtyping import Float
from rich.table import Table
from torch import Tensor

from spd_lens.analysis.common import (
    DIVERGING,
    SEQUENTIAL,
    Findings,
    Subject,
    analysis,
    around,
    filled,
    half_width,
    panel,
    panels,
    place,
    sets,
    summed,
)
from spd_lens.analysis.heads.ablation import MEASURES, head_effects
from spd_lens.analysis.heads.attention import attention_of
from spd_lens.analysis.heads.page import heads_page
from spd_lens.errors import SPDError
from spd_lens.files import write_text
from spd_lens.output import terminal
from spd_lens.sites import Site, resolve_layers
from spd_lens.stats import bracketed
from spd_lens.subspaces import GradientMoments


def head_energy(moments: GradientMoments, null: GradientMoments | None = None) -> pd.DataFrame:
    """Each KV head's share of the gradient energy `Σ ‖g‖²` of its kind, over all layers of the moments.

    Args:
        moments: Moments at the layers of interest (`Subject.moments_everywhere()`).
        null: Moments of the same calibration examples with shuffled answers.

    Returns:
        One row per head: `value`, a share that sums to 1 over layers and heads of a kind, with `low, high` (delete-half
        jackknife over shards); `uniform`, what every head would have if all were alike; `null` and `ratio`, the share
        with shuffled answers and `value / null`.
    """
    moments = filled(moments)
    rows = []
    for kind in dict.fromkeys(site.kind for site in moments.sites):
        sites = [site for site in moments.sites if site.kind == kind]
        energy = torch.cat([_by_head(moments, site) for site in sites], dim=1)
        total = summed(sets(moments.n_shards), energy)
        share = total / total.sum(dim=1, keepdim=True).clamp_min(1e-300)
        width = half_width(share[1:], moments.n_shards)
        cells = [(site, head) for site in sites for head in range(moments.n_heads[site])]
        rows_of_kind = [
            {**place(site, head, per_head=True), **around(share[0, i], width[i]), "uniform": 1 / len(cells)}
            for i, (site, head) in enumerate(cells)
        ]
        if null is not None:
            other = torch.cat([_by_head(null, site).sum(dim=0) for site in sites])
            for row, chance in zip(rows_of_kind, (other / other.sum().clamp_min(1e-300)).tolist(), strict=True):
                row |= {"null": chance, "ratio": row["value"] / max(chance, 1e-300)}
        rows += rows_of_kind
    return pd.DataFrame(rows)


def energy_map(energy: pd.DataFrame) -> go.Figure:
    """Layer × head maps of the energy shares, keys over values."""
    fig = _maps(
        energy, "Gradient energy of each KV head", "share of its kind’s energy",
        says=f"if all heads were alike, each would have {energy['uniform'].iloc[0]:.2%} of its kind's energy",
        hover=lambda r: f"{r.value:.2%} [{r.low:.2%}, {r.high:.2%}]"
        + (f", with other answers {r.null:.2%}" if hasattr(r, "null") else ""),
    )  # fmt: skip
    fig.update_layout(coloraxis={"cmin": 0, "colorbar_tickformat": ".0%"})
    return fig


def effect_map(effects: pd.DataFrame, measure: str = "kl", policy: str = "difference") -> go.Figure:
    """Layer × head maps of what projecting one head does; `•` where the difference from random excludes 0 (95 %)."""
    if measure not in MEASURES:
        raise SPDError(f"unknown measure {measure!r}; choose from {', '.join(MEASURES)}")
    part = effects[(effects["measure"] == measure) & (effects["policy"] == policy)]
    against = effects[(effects["measure"] == measure) & (effects["policy"] == "difference")]
    sure = ((against["low"] > 0) | (against["high"] < 0)).to_numpy()
    rank = "/".join(str(rank) for rank in sorted(set(part["rank"])))
    titles = {
        "subspace": f"Projecting one head alone to rank {rank}: {MEASURES[measure]}",
        "random": f"The same with random subspaces of rank {rank} (null): {MEASURES[measure]}",
        "difference": f"One head at rank {rank}, its subspace minus a random one: {MEASURES[measure]}",
    }
    fig = _maps(
        part, titles[policy], "nats", marks=sure,
        says=f"• the difference from random has a 95 % interval without 0: {sure.sum()} of {len(sure)} heads, "
        f"{0.05 * len(sure):.1f} expected by chance alone",
        hover=lambda r: bracketed(r.value, r.low, r.high, 4),
    )  # fmt: skip
    if policy == "difference" or measure != "kl":
        fig.update_layout(coloraxis={"colorscale": DIVERGING, "cmid": 0})
    else:
        fig.update_layout(coloraxis={"cmin": 0})
    return fig


def say(energy: pd.DataFrame, effects: pd.DataFrame | None = None) -> str:
    """What the maps show, in sentences."""
    sentences = []
    for kind, part in energy.groupby("kind", sort=False):
        top = part.sort_values("value", ascending=False).head(3)
        named = ", ".join(f"{r.layer}.{r.head} ({r.value:.0%})" for r in top.itertuples())
        sentences.append(f"Most gradient energy of {kind.upper()} (layer.head): {named}; uniform {1 / len(part):.1%}.")
    if effects is not None and len(effects):
        part = effects[effects["policy"] == "difference"]
        for measure, rows in part.groupby("measure", sort=False):
            less, more = int((rows["high"] < 0).sum()), int((rows["low"] > 0).sum())
            name = MEASURES[measure].partition(",")[0]
            sentences.append(
                f"{name[0].upper()}{name[1:]}: of {len(rows)} heads projected alone, {less} leave it lower and {more} "
                "higher than a random subspace of that rank does (95 % intervals over "
                f"{int(rows['n'].iloc[0])} items, not corrected; {0.025 * len(rows):.1f} each way by chance)."
            )
    return " ".join(sentences)


@analysis()
def main(
    subject: Subject,
    *,
    rank: Annotated[
        str, typer.Option(help="Directions of a head: a number, or a fraction such as 0.5; the run's if empty.")
    ] = "",
    layers: Annotated[
        str, typer.Option(help="Layers whose heads are projected: all, none, or indices such as 9,14.")
    ] = "all",
    n: Annotated[int, typer.Option(min=2, help="Held-out items.")] = 8,
    n_random: Annotated[int, typer.Option(min=1, help="Random subspaces per head, the null.")] = 1,
    example: Annotated[
        str, typer.Option(help="Id of the calibration example to click through; the shortest if empty.")
    ] = "",
    shuffled: Annotated[bool, typer.Option(help="Energy with shuffled answers too, by a second extraction.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of shuffled answers and random subspaces.")] = 0,
) -> Findings:
    """Which heads: maps of gradient energy and of projecting one head, with what each attends to on an example."""
    pair, examples, directions = subject.pair, subject.calibration(), subject.rank(rank)
    estimated = subject.estimated(layers="all")
    moments = estimated.moments
    energy = head_energy(moments, subject.shuffled_moments(seed, "all") if shuffled else None)
    facts: dict[str, Any] = {"examples": len(examples), "items": n, "n_random": n_random, "seed": seed}
    subject.save("heads", energy, **facts)
    config = subject.run.config
    shown = attention_of(pair, examples, example or None, kinds=config.kinds, loss=config.loss)
    path, title = subject.folder / "heads.html", f"heads of {subject.name}"
    figures, effects, says = [energy_map(energy)], None, say(energy)
    # the maps of energy are there while the ablation runs
    write_text(path, heads_page(title, figures, shown, says=says, facts=facts))
    if layers != "none":
        chosen = resolve_layers(layers, pair.n_layers)
        sites = [site for site in moments.sites if site.layer in chosen and site.kind in ("k", "v")]
        subspace = estimated(directions, sites, per_head=True)
        effects = head_effects(
            pair, subject.held_out(n), subspace, n_random=n_random, seed=seed, progress=subject.progress
        )
        subject.save("heads-effects", effects, **facts)
        for measure in dict.fromkeys(effects["measure"]):
            figures += [effect_map(effects, measure, policy) for policy in ("difference", "subspace", "random")]
        says = say(energy, effects)
        write_text(path, heads_page(title, figures, shown, says=says, facts=facts))
    return Findings(_table(subject.name, energy, effects), says, [path])


def _by_head(moments: GradientMoments, site: Site) -> Float[Tensor, "shard head"]:
    return moments.grams(site).diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def _maps(frame: pd.DataFrame, title: str, unit: str, *, hover: Any, says: str, marks: Any = None) -> go.Figure:
    """A map of the values for each kind, one under the other on one colour scale: layers along x, heads along y."""
    kinds = list(dict.fromkeys(frame["kind"]))
    names = {"k": "keys", "v": "values", "q": "queries"}
    fig = panels([names.get(kind, kind) for kind in kinds], title, "layer", "KV head", columns=1, says=says)
    marked = dict(zip(frame.index, marks, strict=True)) if marks is not None else {}
    for i, kind in enumerate(kinds):
        part = frame[frame["kind"] == kind]
        layers, heads = list(dict.fromkeys(part["layer"])), list(dict.fromkeys(part["head"]))
        cells = {(r.layer, r.head): r for r in part.itertuples()}
        grid = [[cells[layer, head] for layer in layers] for head in heads]
        fig.add_heatmap(
            z=[[r.value for r in row] for row in grid], x=[str(x) for x in layers], y=heads,
            text=[["•" if marked.get(r.Index) else "" for r in row] for row in grid], texttemplate="%{text}",
            customdata=[[hover(r) for r in row] for row in grid], coloraxis="coloraxis", meta=kind, xgap=1, ygap=1,
            hovertemplate=f"layer %{{x}}, {kind.upper()} head %{{y}}: %{{customdata}}<extra></extra>",
            **panel(i),
        )  # fmt: skip
    fig.update_xaxes(type="category", tickangle=0)
    fig.update_yaxes(type="category")
    fig.update_layout(coloraxis={"colorscale": SEQUENTIAL, "colorbar_title": unit}, height=190 + 130 * len(kinds))
    return fig


def _table(name: str, energy: pd.DataFrame, effects: pd.DataFrame | None) -> Table:
    table = []
    for _, part in energy.groupby("kind", sort=False):
        for r in part.sort_values("value", ascending=False).head(5).itertuples():
            kl = {"subspace": "–", "random": "–"}
            if effects is not None:
                mine = effects[(effects["site"] == r.site) & (effects["head"] == r.head) & (effects["measure"] == "kl")]
                kl |= {e.policy: f"{e.value:.4f}" for e in mine.itertuples() if e.policy in kl}
            null = f"{r.null:.1%}" if hasattr(r, "null") else "–"
            table.append([f"{r.layer}.{r.head}", r.kind, f"{r.value:.1%}", null, kl["subspace"], kl["random"]])
    columns = ["layer.head", "kind", "energy share", "with other answers", "KL, subspace", "KL, random"]
    return terminal(columns, table, title=f"heads · {name}")
