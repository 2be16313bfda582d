"""Overlap of gradients against measured transfer: does a subspace that holds B's gradients keep B's losses?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from spd_lens.analysis.common import LOSS_FIELDS, Subject, bars, figure, line, p_value, plain
from spd_lens.analysis.overlap.energy import held_by
from spd_lens.errors import SPDError
from spd_lens.evaluation import OUTCOMES, ForcedItem
from spd_lens.stats import paired_difference
from spd_lens.subspaces import GradientMoments, Subspace

MANY = 10
"""The smallest number of domains from which a link between overlap and transfer can be concluded at all."""

_BESIDE = ("middle right", "middle left", "top center", "bottom center")
"""Where the points of a target have their labels, by number of the target: labels of near points stay apart."""

Forced = Mapping[str, Sequence[ForcedItem]]
"""Teacher-forced items by policy (`base`, `projected`, `random-0`, ...), as `Run.effects` has them."""


def transfer(
    subspaces: Mapping[str, Subspace],
    moments: Mapping[str, GradientMoments],
    effects: Mapping[tuple[str, str], Forced],
    random_seeds: Mapping[str, int] | None = None,
) -> pd.DataFrame:
    """For each pair of domains: how much of B's gradient energy A's subspace holds, and what projecting does to B.

    Args:
        subspaces: The very subspaces that were projected, by domain.
        moments: Moments by domain.
        effects: Teacher-forced items of B under A's subspace by (A, B), at least under `base` and `projected`.
        random_seeds: Seeds by domain: `random-i` was `subspace.random_like(seed + i)`. Without them no controls.

    Returns:
        Columns `a, b, of, outcome, energy, energy_low, energy_high, chance, change, low, high, n`, a row for each loss
        of `OUTCOMES` that the items have. `of` is `"projected"` or `"random"`; `energy` and its ends are means over
        sites and heads, which makes the interval a wide one. `change` is B's loss under the projection minus the
        base's, in nats per token, paired per item, with a bootstrap interval over the `n` items.
    """
    rows: list[dict[str, Any]] = []
    for (a, b), policies in effects.items():
        if a not in subspaces or b not in moments:
            continue
        points = _points(subspaces[a], moments[b], policies, "projected")
        rows += [{"a": a, "b": b, "of": "projected", **point} for point in points]
        for name in policies:
            kind, _, number = name.partition("-")
            if kind == "random" and number.isdecimal() and random_seeds is not None:
                control = subspaces[a].random_like(random_seeds[a] + int(number))
                points = _points(control, moments[b], policies, name)
                rows += [{"a": a, "b": b, "of": "random", **point} for point in points]
    if not rows:
        raise SPDError(
            "no run was evaluated on another one's task, so there is no transfer; run them with the same --eval-tasks"
        )
    return pd.DataFrame(rows)


def _points(subspace: Subspace, moments: GradientMoments, policies: Forced, name: str) -> Iterator[dict[str, Any]]:
    means = held_by(subspace, moments)[["value", "low", "high", "chance"]].mean()
    for field in LOSS_FIELDS:
        base, projected = ({item.id: getattr(item, field) for item in policies[of]} for of in ("base", name))
        shared = [key for key in base if None not in (base[key], projected.get(key))]
        if not shared:
            continue
        change = paired_difference([base[key] for key in shared], [projected[key] for key in shared])
        yield {
            "outcome": field, "energy": means.value, "energy_low": means.low, "energy_high": means.high,
            "chance": means.chance, "change": change.value, "low": change.low, "high": change.high, "n": change.n,
        }  # fmt: skip


def association(frame: pd.DataFrame, *, permutations: int = 999, seed: int = 0) -> tuple[float, float]:
    """Correlation of energy held with the change of one loss within each target, and its p-value.

    Both are centred on each target's mean over the subspaces. The null relabels which domain's subspace is which, at
    all targets alike (Mantel's way: the points share subspaces and targets, so they are not independent). One-sided:
    more energy held, less loss. With three domains there are six relabellings, and p is at least 1/6.
    """
    mine = frame[frame.of == "projected"]
    energy = mine.pivot(index="a", columns="b", values="energy")
    change = mine.pivot(index="a", columns="b", values="change")
    if energy.isna().any(axis=None) or min(energy.shape) < 2 or len(energy) < 3:
        raise SPDError("an association needs at least three domains, each subspace measured on each task")
    x = (energy - energy.mean()).to_numpy()
    y = (change - change.mean()).to_numpy()
    scale = math.sqrt((x**2).sum() * (y**2).sum())
    if not scale:
        raise SPDError("all subspaces hold the same energy or change the loss alike, so that nothing is associated")
    n = len(x)
    if math.factorial(n) <= permutations:
        _, *orders = itertools.permutations(range(n))  # the first is the order as it is
    else:
        rng = np.random.default_rng(seed)
        orders = [tuple(rng.permutation(n)) for _ in range(permutations)]
    observed = float((x * y).sum()) / scale
    null = [float((x[list(order)] * y).sum()) / scale for order in orders]
    return observed, p_value(observed, torch.tensor(null, dtype=torch.float64), smaller=True)


def transfer_sentence(frame: pd.DataFrame) -> str:
    """What the points can and cannot say, loss by loss."""
    mine = frame[frame.of == "projected"]
    n = mine.a.nunique()
    parts = []
    for outcome, part in frame.groupby("outcome", sort=False):
        text = f"{OUTCOMES[str(outcome)]}, {int((part.of == 'projected').sum())} points"
        try:
            r, p = association(part)
        except SPDError:
            parts.append(f"{text}: too few for any conclusion")
            continue
        text += f": correlation within targets {r:.2f}, p = {p:.2g}"
        holds = "within noise" if p >= 0.05 else "subspaces that hold more of the gradients cost less"
        parts.append(text if n < MANY else f"{text}, {holds}")
    few = " With so few domains nothing can be concluded." if n < MANY else ""
    return f"Overlap against transfer, {n} domains, by relabelling the subspaces: {'; '.join(parts)}.{few}"


def transfer_figures(frame: pd.DataFrame) -> list[go.Figure]:
    """`transfer_figure` of every loss of the table."""
    return [transfer_figure(frame, str(outcome)) for outcome in dict.fromkeys(frame.outcome)]


def transfer_figure(frame: pd.DataFrame, outcome: str = "aligned_loss") -> go.Figure:
    """Energy held against the change of one loss, a colour and symbol per target; random subspaces grey."""
    frame, loss = frame[frame.outcome == outcome], OUTCOMES[outcome]
    fig = figure(
        f"Overlap of gradients against transfer: {loss}",
        "share of the target's gradient energy that the subspace holds",
        f"change of {loss} (nats per token)",
        says="each point: one domain's projection on held-out items, minus base; bars: 95 % over items; grey: random",
    )
    random = frame[frame.of == "random"]
    if not random.empty:
        labels = [f"random on {plain(row.b)}" for row in random.itertuples()]
        line(fig, random.energy, random.change, "random subspaces", null=True, mode="markers", hovertext=labels)
    for index, target in enumerate(dict.fromkeys(frame.b)):
        rows = frame[(frame.b == target) & (frame.of == "projected")]
        line(
            fig, rows.energy, rows.change, f"on {plain(target)}", index=index, size=11, mode="markers+text",
            text=[plain(a) for a in rows.a], textposition=_BESIDE[index % len(_BESIDE)],
            error_y=bars(rows.change, rows.low, rows.high),
        )  # fmt: skip
    fig.add_hline(y=0, line={"color": "#999999", "width": 1})
    fig.update_xaxes(range=[max(0.0, frame.energy.min() - 0.05), 1.08])
    fig.update_layout(height=520)
    return fig


def transfer_of(subjects: Sequence[Subject]) -> pd.DataFrame:
    """`transfer` of runs that were evaluated on each other's tasks: subspaces and effects as the runs left them."""
    effects: dict[tuple[str, str], Forced] = {}
    for a, b in itertools.product(subjects, repeat=2):
        for target, task in a.run.config.targets.items():
            path = a.run.path / "effects" / f"{target}.json"
            if task == b.run.config.task and path.exists():
                effects[a.name, b.name] = a.run.effects(target)
    return transfer(
        {one.name: one.subspace for one in subjects},
        {one.name: one.moments for one in subjects},
        effects,
        {one.name: one.run.config.seed for one in subjects},
    )
