"""How many calibration examples a subspace needs, and what spoils it (paper Fig. 4, section A.1).

Two disjoint sets of examples would span the same subspace if the examples were enough. How far they agree, against
random subspaces of the same rank, is measured here as a function of their number; faults in the examples are in
`faults`. The paper sweeps 20-500 examples and reports accuracy alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import typer
from rich.table import Table

from spd_lens.analysis.calibration.faults import (
    biased,
    faults_figure,
    faults_sentence,
    misplaced_spans,
    per_shard,
    sensitivity,
    summarise,
    wrong_answers,
)
from spd_lens.analysis.calibration.losses import losses_figure, losses_under
from spd_lens.analysis.common import ENERGY, MEASURES, Findings, Subject, agreement, analysis, band, figure, line
from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.output import Console, terminal
from spd_lens.subspaces import GradientMoments, Rank, Subspace, extract

UNITS = {ENERGY: "share of gradient energy", "mean squared cosine": "mean squared cosine", "mean angle": "degrees"}
_GROUPS = ("subject", "subtask", "category")
"""Keys of `Example.meta` that name a group of similar examples."""
_MEMORY = 2**30
"""Bytes that the moments of one extraction may take; three are in memory at a time."""


def stability(
    moments: GradientMoments,
    sizes: Sequence[int] | None = None,
    *,
    rank: Rank = 0.5,
    per_head: bool = True,
    draws: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """How far subspaces from disjoint sets of `n` examples each agree, for several `n`.

    For each size there are `draws` pairs of sets. As many as fit side by side are disjoint from each other too; then
    the examples are shuffled anew. At half of all examples a draw is a new division of the same examples, so the spread
    over draws then says too little about other examples.

    Args:
        moments: Moments in many shards (`extract(..., shards=...)`) of equally many examples: a set is of whole shards.
        sizes: Examples per set, multiples of the examples per shard; by default 1, 2, 5, 10, ... shards up to half.
        rank: Rank of the subspaces.
        per_head: A subspace per head, or one over all heads.
        draws: Number of pairs of sets per size.
        seed: Seed of the division into sets and of the random subspaces.

    Returns:
        Columns `site, layer, kind, head, n_examples, draw, of, measure, value`. `of` is `"subspace"` or the null
        `"random"`, a random subspace of the same rank against the second set. Measures: `"energy share"`
        `tr(P_A C_B) / tr C_B` of held-out gradient energy, `"mean squared cosine"` `‖P_A P_B‖²_F / r`, both in
        [0, 1], and `"mean angle"`, the mean principal angle in degrees.

    Raises:
        SPDError: shards of unequal numbers of examples, or a size that is no multiple of them or more than half.
    """
    each = per_shard(moments)
    half = moments.n_shards // 2
    if sizes is None:
        sizes = [each * m for m in (1, 2, 5, 10, 20, 50, 100, 200, 500) if m < half] + [each * half]
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for size in sizes:
        count = size // each
        if size % each or not 1 <= count <= half:
            raise SPDError(
                f"{size} examples do not make two disjoint sets here: the moments have {moments.n_shards} shards of "
                f"{each}; choose multiples of {each} up to {each * half}, or extract more"
            )
        for draw, (first, second) in enumerate(_disjoint(moments.n_shards, count, draws, rng)):
            a = moments.shards(first).subspace(rank, per_head=per_head)
            held_out = moments.shards(second)
            for of, subspace in (("subspace", a), ("random", a.random_like(seed + draw))):
                here = {"n_examples": size, "draw": draw, "of": of}
                rows += agreement(subspace, held_out, rank, here)
    return pd.DataFrame(rows)


def _disjoint(n_shards: int, count: int, draws: int, rng: np.random.Generator) -> Iterator[tuple[list[int], list[int]]]:
    made = 0
    while made < draws:
        order = rng.permutation(n_shards).tolist()
        for begin in range(0, n_shards - 2 * count + 1, 2 * count):
            if made < draws:
                yield order[begin : begin + count], order[begin + count : begin + 2 * count]
                made += 1


def stability_figure(frame: pd.DataFrame, measure: str = ENERGY) -> go.Figure:
    """A line for each site over the number of examples: the mean over heads, in a band from lowest to highest draw."""
    if measure not in MEASURES:
        raise SPDError(f"unknown measure {measure!r}; choose from {', '.join(MEASURES)}")
    table = summarise(frame[frame.measure == measure], ["n_examples"])
    titles = {
        ENERGY: "Gradient energy of new examples that the subspace holds",
        "mean squared cosine": "Overlap of subspaces from disjoint examples",
        "mean angle": "Mean principal angle between subspaces from disjoint examples",
    }
    fig = figure(
        titles[measure], "calibration examples in each of the two sets", UNITS[measure],
        says="mean over heads; bands: range over draws of disjoint sets; grey: random subspaces of the same rank",
    )  # fmt: skip
    sites = list(dict.fromkeys(frame.sort_values(["layer", "kind"]).site))
    for of in ("random", "subspace"):
        for index, site in enumerate(sites):
            part = table[(table.site == site) & (table.of == of)].sort_values("n_examples")
            null = of == "random"
            band(fig, part.n_examples, part.low, part.high, index=index, null=null)
            # one entry in the legend for all nulls, since at one rank they lie on each other
            first = {"showlegend": index == 0} if null else {}
            line(
                fig, part.n_examples, part.value, "random subspaces" if null else site, index=index, null=null, **first
            )
    sizes = sorted(frame.n_examples.unique())
    fig.update_xaxes(type="log", tickvals=sizes, ticktext=[str(n) for n in sizes])
    fig.update_yaxes(range=[0, 90] if measure == "mean angle" else [0, 1.02])
    return fig


def stability_sentence(frame: pd.DataFrame) -> str:
    """What the energy share says over all sites: agreement at the largest size, its null, and where it settles."""
    energy = frame[frame.measure == ENERGY]
    means = energy.groupby(["of", "n_examples", "draw"]).value.mean()
    of = {kind: means[kind].groupby("n_examples").agg(["mean", "min", "max"]) for kind in ("subspace", "random")}
    found, largest = of["subspace"], energy.n_examples.max()
    last, null = found.loc[largest], of["random"].loc[largest]
    text = (
        f"Subspaces from {largest} examples hold {last['mean']:.3f} [{last['min']:.3f}, {last['max']:.3f}] of the "
        f"gradient energy of {largest} other examples (range over draws); random ones {null['mean']:.3f}."
    )
    if last["min"] <= null["max"]:
        return f"{text} That is no more than random ones hold."
    below = found.index[found["mean"] < last["min"]]
    settled = int(found.index[found.index > below.max()][0]) if len(below) else int(found.index[0])
    if settled == largest:
        return f"{text} It still rises with the number of examples."
    return f"{text} From {settled} examples on, the mean lies within the range over draws at {largest}."


@analysis()
def main(
    subject: Subject,
    *,
    sizes: Annotated[str, typer.Option(help="Examples per set; twice the largest are drawn.")] = "5,10,20,50",
    rank: Annotated[str, typer.Option(help="Directions per block: integer or fraction; the run's own if empty.")] = "",
    draws: Annotated[int, typer.Option(help="Number of pairs of disjoint sets per size.")] = 8,
    faults: Annotated[bool, typer.Option(help="Also wrong answers, misplaced spans and a biased choice.")] = True,
    items: Annotated[int, typer.Option(help="Held-out items for the loss under projection; 0 leaves it out.")] = 24,
    seed: Annotated[int, typer.Option(help="Seed of divisions, faults and random subspaces.")] = 0,
) -> None:
    """How many calibration examples a subspace needs, and what spoils it."""
    config, console = subject.run.config, Console()
    subject.say_estimator()
    examples, possible = _drawn(subject, _sizes(sizes), console)
    settings: dict[str, Any] = {
        "settings": config.extraction,
        "shards": _shards(subject, len(examples), math.gcd(*possible)), "progress": subject.progress,
    }  # fmt: skip
    how: dict[str, Any] = {"rank": subject.rank(rank), "per_head": config.per_head, "draws": draws, "seed": seed}
    clean = extract(subject.pair, examples, **settings)
    frame = stability(clean, possible, **how)
    says = stability_sentence(frame)
    figures = [stability_figure(frame, measure) for measure in MEASURES]
    facts: dict[str, Any] = {"sizes": possible, "n_examples": len(examples), **how}
    if items:
        held_out = subject.held_out(items)
        chosen = _subspaces_by_size(clean, possible, how)
        losses = losses_under(subject.pair, chosen, held_out, progress=subject.progress)
        figures += [
            losses_figure(losses, measure, title=f"{measure[0].upper()}{measure[1:]} under projection")
            for measure in dict.fromkeys(losses.measure)
        ]
        subject.save("calibration_size-losses", losses, n_items=len(held_out), **facts)
    subject.save("calibration_size", frame, figures, says=says, **facts)
    Findings(_table(frame, subject.name), says).show()
    if faults:
        _analyse_faults(subject, examples, clean, settings, how, console)


def _drawn(subject: Subject, sizes: list[int], console: Console) -> tuple[list[Example], list[int]]:
    """Twice as many examples as the largest size needs, and the sizes that are possible with what there is."""
    config = subject.run.config
    available, examples = len(subject.task.pool("calibration")), []
    possible = [size for size in sizes if 2 * size <= available]
    if possible and len(examples := subject.calibration(2 * max(possible))) < 2 * max(possible):
        available = len(examples)  # the run leaves out examples that are too long
        possible = [size for size in possible if 2 * size <= available]
    if not possible:
        raise SPDError(f"{config.task} has {available} calibration examples, fewer than two sets of {min(sizes)}")
    if possible != sizes:
        console.print(f"{config.task} has {available} calibration examples: sizes {possible} alone are possible")
    return examples[: 2 * max(possible)], possible


def _shards(subject: Subject, n_examples: int, common: int) -> int:
    """One example per shard, which a biased choice needs; where that takes too much memory, the sizes' divisor."""
    config, fingerprint = subject.run.config, subject.pair.fingerprint
    widths = [math.prod(fingerprint.heads_at(site)) for site in subject.pair.sites(config.layers, config.kinds)]
    fits = n_examples * sum(2 * 8 * width**2 for width in widths) <= _MEMORY
    return n_examples if fits else n_examples // common


def _analyse_faults(
    subject: Subject, examples: list[Example], clean: GradientMoments, settings: Any, how: Any, console: Console
) -> None:
    spoiled = {}
    for name, spoil in (("wrong answers", wrong_answers), ("misplaced spans", misplaced_spans)):
        try:
            spoiled[name] = extract(subject.pair, spoil(examples, how["seed"]), **settings)
        except SPDError as error:  # few distinct answers, or completions of a single word
            console.print(f"{name} left out: {error}", highlight=False, markup=False)
    tables, figures, says = [], [], []
    if spoiled:
        tables.append(sensitivity(clean, spoiled, **how).assign(kind_of_fault="share spoiled"))
        figures.append(faults_figure(tables[-1], "share of the examples that are spoiled"))
        says.append(faults_sentence(tables[-1]))
    if per_shard(clean) == 1 and (choices := _choices(examples)):
        tables.append(biased(clean, choices, **how).assign(kind_of_fault="share chosen"))
        figures.append(faults_figure(tables[-1], "share of the examples that is chosen"))
        says.append(faults_sentence(tables[-1]))
    if tables:
        text = " ".join(says)
        subject.save("calibration_size-faults", pd.concat(tables), figures, says=text, n_examples=len(examples), **how)
        console.print(text, highlight=False)


def _choices(examples: list[Example]) -> dict[str, list[Any]]:
    """Keys of biased choices: by length of the whole example, and by every property that groups examples."""
    lengths = [len(e.prompt) + len(e.completion) for e in examples]
    found: dict[str, list[Any]] = {"shortest examples": lengths, "longest examples": [-length for length in lengths]}
    for name in _GROUPS:
        if all(name in e.meta for e in examples):
            found[f"few {name}s"] = [str(e.meta[name]) for e in examples]
    return {name: keys for name, keys in found.items() if len(set(keys)) > 1}


def _subspaces_by_size(clean: GradientMoments, sizes: list[int], how: dict[str, Any]) -> dict[str, list[Subspace]]:
    """Two disjoint draws of each size, and two random subspaces."""
    rng = np.random.default_rng(how["seed"])
    found: dict[str, list[Subspace]] = {}
    for size in sizes:
        pairs = next(_disjoint(clean.n_shards, size // per_shard(clean), 1, rng))
        made = [clean.shards(half).subspace(how["rank"], per_head=how["per_head"]) for half in pairs]
        found[f"{size} examples"] = made
    found["random"] = [made[0].random_like(how["seed"] + i) for i in range(2)]
    return found


def _table(frame: pd.DataFrame, name: str) -> Table:
    means = frame.groupby(["n_examples", "measure", "of"]).value.mean()
    rows = [
        [str(size), *(f"{means[size, m, 'subspace']:.3g} ({means[size, m, 'random']:.3g})" for m in MEASURES)]
        for size in sorted(frame.n_examples.unique())
    ]
    return terminal(["examples", *MEASURES], rows, title=f"agreement of disjoint sets, {name} (random in brackets)")


def _sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise SPDError(f"sizes {text!r} are no numbers of examples; write them as in '5,10,20,50'")
    return sorted({int(part) for part in parts})
