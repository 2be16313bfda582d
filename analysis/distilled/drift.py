"""The subspace after distillation against the one before, and how much of the projected behaviour the LoRA absorbed.

Moments before and after are extracted from the same examples, so that training made whatever differs. The yardstick is
the difference between two halves of the examples in the untrained model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import typer

from spd_lens.analysis.common import (
    ENERGY,
    MEASURES,
    Findings,
    Subject,
    agreement,
    analysis,
    bars,
    figure,
    half_width,
    halves,
    line,
    place,
)
from spd_lens.analysis.distilled.absorption import absorbed, absorption, absorption_figure, absorption_sentence
from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.models import ModelPair, adapted, neutrally
from spd_lens.output import terminal
from spd_lens.subspaces import GradientMoments, Rank, extract


@neutrally
def moments_after(
    pair: ModelPair, adapter: str | Path, examples: Sequence[Example], **settings: Any
) -> GradientMoments:
    """Moments of the twin with an adapter on (`extract(..., engine="twin")`); the twin is left as it was.

    Args:
        pair: The model before training.
        adapter: The directory of a PEFT adapter or of a whole checkpoint.
        examples: The same examples as before training.
        settings: Settings of `extract`, the same as before training.
    """
    with adapted(pair.hf, adapter):
        return extract(pair, examples, **{**settings, "engine": "twin"})


def drift(
    before: GradientMoments,
    after: GradientMoments,
    *,
    rank: Rank = 0.5,
    per_head: bool = True,
    seed: int = 0,
) -> pd.DataFrame:
    """The subspace before against the gradients after, by site and head.

    Args:
        before: Moments of the untrained model.
        after: Moments of the trained one, of the same examples in the same shards.
        rank: Rank of the subspaces.
        per_head: A subspace per head, or one over all heads.
        seed: Seed of the random subspace, and of the halves where there are many shards.

    Returns:
        Columns `site, layer, kind, head, of, measure, value, low, high`. Measures as in `calibration.stability`.
        `of`: `"before, after"`, with a 95 % interval from halves of the shards, before and after alike;
        `"halves before"`, two halves of the examples in the untrained model, which is what other examples alone would
        change; `"random"`, a random subspace against the gradients after; and for the energy share `"after, after"`,
        the most that this rank can hold. Only the first has an interval.
    """
    _check_same_examples(before, after)
    before, after = _filled(before), _filled(after)
    old = before.subspace(rank, per_head=per_head)
    new = after.subspace(rank, per_head=per_head)
    rows = [*agreement(old, after, rank, {"of": "before, after"})]
    rows += [row for row in agreement(new, after, rank, {"of": "after, after"}) if row["measure"] == ENERGY]
    rows += agreement(old.random_like(seed), after, rank, {"of": "random"})
    if before.n_shards > 1:
        first, second = before.halves()
        rows += agreement(first.subspace(rank, per_head=per_head), second, rank, {"of": "halves before"})
    frame = pd.DataFrame(rows).assign(low=float("nan"), high=float("nan"))
    mine = frame.index[frame.of == "before, after"]
    width = _half_widths(before, after, rank, per_head, seed)
    if width is not None and len(width) == len(mine):
        value = frame.loc[mine, "value"]
        highest = np.where(frame.loc[mine, "measure"] == "mean angle", 90.0, 1.0)
        frame.loc[mine, "low"] = (value - width).clip(lower=0.0)
        frame.loc[mine, "high"] = np.minimum(value + width, highest)
    return frame


def _half_widths(
    before: GradientMoments, after: GradientMoments, rank: Rank, per_head: bool, seed: int
) -> np.ndarray | None:
    """Half the width of each row's interval; None if there are too few shards, or halves that lack a head."""
    if before.n_shards < 2:
        return None
    found = []
    for half in halves(before.n_shards, seed):
        chosen = half.nonzero().flatten().tolist()
        subspace = before.shards(chosen).subspace(rank, per_head=per_head)
        found.append([row["value"] for row in agreement(subspace, after.shards(chosen), rank, {})])
    if len({len(values) for values in found}) > 1:
        return None
    return half_width(torch.tensor(found, dtype=torch.float64), before.n_shards).numpy()


def spectra_before_after(before: GradientMoments, after: GradientMoments, *, per_head: bool = True) -> pd.DataFrame:
    """Gradient energy by rank before and after: columns `site, layer, kind, head, rank, of, singular_value,
    cumulative, share_of_model`.

    `cumulative` is the share of the block's own energy in its leading `rank` directions, `share_of_model` the block's
    share of the energy at all sites. Singular values are in nats per unit of activation.
    """
    _check_same_examples(before, after)
    rows = []
    for of, moments in (("before", before), ("after", after)):
        total = sum(moments.blocks(site).diagonal(dim1=1, dim2=2).sum() for site in moments.sites)
        for site in moments.sites:
            for block, values in enumerate(moments.singular_values(site, per_head)):
                energy = values.square()
                if not energy.sum():
                    continue  # a head that the loss does not depend on has no spectrum
                cumulative = (energy.cumsum(0) / energy.sum()).tolist()
                share = (energy.sum() / total).item()
                where = {**place(site, block, per_head), "of": of}
                for r, (value, held) in enumerate(zip(values.tolist(), cumulative, strict=True), 1):
                    rows.append(
                        {**where, "rank": r, "singular_value": value, "cumulative": held, "share_of_model": share}
                    )
    return pd.DataFrame(rows)


def _filled(moments: GradientMoments) -> GradientMoments:
    """The moments without shards that hold no example, which there are if examples are few."""
    return moments.shards(moments.n_examples.nonzero().flatten().tolist())


def _check_same_examples(before: GradientMoments, after: GradientMoments) -> None:
    before.fingerprint.check(after.fingerprint, "the moments before training")
    if before.sites != after.sites or not torch.equal(before.n_tokens, after.n_tokens):
        raise SPDError(
            "the moments before and after are not of the same sites and examples; extract both with the same layers, "
            "kinds, examples and shards"
        )


def drift_figure(frame: pd.DataFrame, measure: str = ENERGY) -> go.Figure:
    """A point for each site and head: the subspace before against the gradients after, beside references in grey."""
    if measure not in MEASURES:
        raise SPDError(f"unknown measure {measure!r}; choose from {', '.join(MEASURES)}")
    part = frame[frame.measure == measure].sort_values(["layer", "kind", "head"])
    fig = figure(
        "The subspace before training against the gradients after it",
        "site and head",
        f"{measure} (degrees)" if measure == "mean angle" else measure,
        says="labels: layer.kind and KV head; bars: 95 % interval over halves of the examples; grey: references",
    )
    references = {"random": "circle-open", "halves before": "square-open", "after, after": "diamond-open"}
    names = {
        "random": "random subspace",
        "halves before": "two halves of the examples, before",
        "after, after": "the subspace after (most that this rank holds)",
    }
    for of, symbol in references.items():
        mine = part[part.of == of]
        if not mine.empty:
            line(fig, _places(mine), mine.value, names[of], null=True, symbol=symbol, mode="markers")
    mine = part[part.of == "before, after"]
    line(fig, _places(mine), mine.value, "before, after", mode="markers", error_y=bars(mine.value, mine.low, mine.high))
    fig.update_xaxes(categoryorder="array", categoryarray=list(dict.fromkeys(_places(part))))
    fig.update_layout(legend_y=-0.3)  # below the axis title, also where it wraps
    fig.update_yaxes(range=[0, 92] if measure == "mean angle" else [0, 1.03])
    return fig


def spectra_figure(frame: pd.DataFrame) -> go.Figure:
    """Cumulative gradient energy by rank, a line per site before (solid) and after (dotted), mean over heads."""
    table = frame.groupby(["layer", "kind", "site", "of", "rank"], as_index=False).cumulative.mean()
    fig = figure(
        "Gradient energy in the leading directions, before and after",
        "leading directions per block",
        "share of the block's energy",
        says="mean over heads; solid: before, dotted: after",
    )
    for index, site in enumerate(dict.fromkeys(table.site)):
        for of in ("before", "after"):
            mine = table[(table.site == site) & (table.of == of)]
            line(fig, mine["rank"], mine.cumulative, f"{site}, {of}", index=index, mode="lines")
            fig.data[-1].line.dash = "solid" if of == "before" else "dot"
    widths = [2**i for i in range(12) if 2**i <= table["rank"].max()]
    fig.update_xaxes(type="log", tickvals=widths)
    fig.update_layout(legend_y=-0.3)
    fig.update_yaxes(range=[0, 1.02])
    return fig


def _places(frame: pd.DataFrame) -> list[str]:
    return [site if head == "all" else f"{site} {head}" for site, head in zip(frame.site, frame["head"], strict=True)]


def drift_sentence(frame: pd.DataFrame) -> str:
    """What the energy share says over all sites and heads, against what other examples alone would change."""
    mean = frame[frame.measure == ENERGY].groupby("of").value.mean()
    angle = frame[frame.measure == "mean angle"].groupby("of").value.mean()
    text = (
        f"The subspace from before holds {mean['before, after']:.3f} of the gradient energy after training; the most "
        f"that its rank can hold is {mean['after, after']:.3f}, a random subspace holds {mean['random']:.3f}."
    )
    if "halves before" not in angle:
        return text
    smaller = angle["before, after"] < angle["halves before"]
    return (
        f"{text} Training turned it by {angle['before, after']:.1f}° on average, "
        f"{'less' if smaller else 'no less'} than choosing other examples does ({angle['halves before']:.1f}° between "
        "halves)."
    )


@analysis(runs="Finished run directories, with an adapter.")
def main(
    subject: Subject,
    *,
    items: Annotated[int, typer.Option(help="Number of held-out items for the KL.")] = 24,
    n_random: Annotated[int, typer.Option(help="Number of random projections, the control.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of random subspaces and resampling.")] = 0,
) -> Findings:
    """The subspace after distillation against the one before."""
    adapter = subject.run.adapter  # refuses an unfinished run before the model is loaded
    held_out = subject.held_out(items)
    config = subject.run.config
    settings: dict[str, Any] = {"settings": config.extraction, "progress": subject.progress}
    examples = subject.calibration()
    # both on the twin: in bfloat16 the engines round differently, which is no drift
    before = extract(subject.pair, examples, engine="twin", **settings)
    after = moments_after(subject.pair, adapter, examples, **settings)
    how: dict[str, Any] = {"per_head": config.per_head, "seed": seed}
    rank = subject.rank("")
    subject.say_estimator()
    frame = drift(before, after, rank=rank, **how)
    spectra = spectra_before_after(before, after, per_head=config.per_head)
    kls = absorption(
        subject.pair, held_out, subject.subspace, adapter, strength=config.strength, n_random=n_random, seed=seed,
        progress=subject.progress,
    )  # fmt: skip
    estimates = absorbed(kls, seed=seed)
    says = f"{drift_sentence(frame)} {absorption_sentence(estimates)}"
    facts = {"rank": rank, "n_examples": len(examples), "n_items": len(held_out), **how}
    figures = [drift_figure(frame, measure) for measure in MEASURES]
    figures += [spectra_figure(spectra), absorption_figure(kls)]
    subject.save("drift-spectra", spectra, **facts)
    subject.save("drift-absorption", kls, estimates={k: v.to_dict() for k, v in estimates.items()}, **facts)
    subject.save("drift", frame, figures, says=says, **facts)
    rows = []
    cells = frame.set_index(["site", "head", "measure", "of"]).value.sort_index()
    for site, head in dict.fromkeys(zip(frame.site, frame["head"], strict=True)):
        energy = cells[site, head, ENERGY]
        shown = [f"{energy[of]:.3f}" for of in ("before, after", "after, after", "random")]
        rows.append([f"{site} {head}", *shown, f"{cells[site, head, 'mean angle', 'before, after']:.1f}°"])
    head = ["site and head", "energy share", "most", "random", "mean angle"]
    return Findings(terminal(head, rows, title=f"drift of {subject.name}"), says)
