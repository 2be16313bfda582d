"""What spoils a calibration set: wrong answers, misplaced spans, a biased choice; against half-split and chance.

A subspace from a spoiled half of the examples is compared with one from the other, clean half. With nothing spoiled
that is the half-split ceiling, as high as two honest calibrations agree; random subspaces are the floor; leaving the
spoiled examples out instead shows what their mere absence would cost.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from spd_lens.analysis.common import ENERGY, agreement, band, figure, line
from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.subspaces import GradientMoments, Rank, shuffled_answers

LEFT_OUT = "left out instead"
AT_RANDOM = "drawn at random"


def wrong_answers(examples: Sequence[Example], seed: int) -> list[Example]:
    """Every example with another one's answer."""
    return shuffled_answers(examples, seed)


def misplaced_spans(examples: Sequence[Example], seed: int) -> list[Example]:
    """Every example with each span moved to another word of its completion, which touches none of its spans.

    Prompt, completion and the number of spans stay; where a completion has fewer other words than spans, the words are
    taken in turn and there are fewer spans.

    Raises `SPDError` for an example without spans or without another word.
    """
    rng = random.Random(seed)
    return [_misplaced(example, rng) for example in examples]


def _misplaced(example: Example, rng: random.Random) -> Example:
    words = [(match.start(), match.end()) for match in re.finditer(r"\S+", example.completion)]
    free = [(a, b) for a, b in words if all(b <= start or end <= a for start, end in example.spans)]
    if not example.spans or not free:
        raise SPDError(
            f"the spans of example {example.id or example.prompt[:40]!r} cannot be moved: its completion has no "
            "other word, or no span; leave it out"
        )
    chosen = sorted(rng.sample(free, min(len(free), len(example.spans))))
    return replace(example, spans=tuple(chosen))


def sensitivity(
    clean: GradientMoments,
    spoiled: Mapping[str, GradientMoments],
    shares: Sequence[float] = (0.1, 0.25, 0.5, 1.0),
    *,
    rank: Rank = 0.5,
    per_head: bool = True,
    draws: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """How far a subspace from one half of the examples, a share of them spoiled, agrees with the other, clean half.

    Args:
        clean: Moments in many shards of equally many examples.
        spoiled: Moments of the same examples in the same shards, each of them spoiled, by the fault's name.
        shares: Shares of the half's shards that are spoiled; 0, the half-split ceiling, is always there.
        rank: Rank of the subspaces.
        per_head: A subspace per head, or one over all heads.
        draws: Number of divisions into halves.
        seed: Seed of the divisions and of the random subspaces.

    Returns:
        Columns `site, layer, kind, head, fault, share, draw, of, measure, value`, with measures and
        `of` as in `stability`. The fault `"left out instead"` is the control: the half without its spoiled
        share. It has no share of 1, where nothing would be left.
    """
    per_shard(clean)
    for name, moments in spoiled.items():
        if moments.sites != clean.sites or not torch.equal(moments.n_examples, clean.n_examples):
            raise SPDError(f"the moments with {name} are not of the same sites and shards as the clean ones")
    _check_shares(shares)
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for draw in range(draws):
        half, other = _halves(clean.n_shards, rng)
        held_out = clean.shards(other)
        floor = clean.shards(half).subspace(rank, per_head=per_head).random_like(seed + draw)
        for share in sorted({0.0, *shares}):
            count = round(share * len(half))
            kept = clean.shards(half[count:]) if count < len(half) else None
            for fault in (*spoiled, LEFT_OUT):
                added = spoiled[fault].shards(half[:count]) if count and fault != LEFT_OUT else None
                found = [part.pooled() for part in (kept, added) if part is not None]
                if not found:
                    continue
                mixed = found[0] if len(found) == 1 else found[0] + found[1]
                subspace = mixed.subspace(rank, per_head=per_head)
                here = {"fault": fault, "share": share, "draw": draw}
                rows += agreement(subspace, held_out, rank, {**here, "of": "subspace"})
            rows += agreement(floor, held_out, rank, {"fault": "none", "share": share, "draw": draw, "of": "random"})
    return pd.DataFrame(rows)


def biased(
    clean: GradientMoments,
    keys: Mapping[str, Sequence[float | str]],
    shares: Sequence[float] = (0.1, 0.25, 0.5),
    *,
    rank: Rank = 0.5,
    per_head: bool = True,
    draws: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """How far a subspace from a biased choice out of one half of the examples agrees with the whole other half.

    Args:
        clean: Moments with one example per shard, `extract(..., shards=len(examples))`.
        keys: A key for each example, by the name of the bias. Of numbers the lowest are chosen; of texts (a subject,
            say) groups are chosen one after the other, in random order, until there are enough examples.
        shares: Shares of the half that are chosen.
        rank: Rank of the subspaces.
        per_head: A subspace per head, or one over all heads.
        draws: Number of divisions into halves.
        seed: Seed of the divisions, of the order of groups and of the random subspaces.

    Returns:
        Columns as in `sensitivity`. The fault `"drawn at random"` is the control: as many, chosen at random; share 1,
        the whole half, is the half-split ceiling.
    """
    if per_shard(clean) != 1:
        raise SPDError("a biased choice needs one example per shard; extract with shards=len(examples)")
    for name, values in keys.items():
        if len(values) != clean.n_shards:
            raise SPDError(f"{name} has {len(values)} keys for {clean.n_shards} examples; give one for each")
    _check_shares(shares)
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for draw in range(draws):
        half, other = _halves(clean.n_shards, rng)
        held_out = clean.shards(other)
        floor = clean.shards(half).subspace(rank, per_head=per_head).random_like(seed + draw)
        orders = {name: _ordered(half, values, rng) for name, values in keys.items()}
        for share in sorted({*shares, 1.0}):
            count = max(1, round(share * len(half)))
            for fault, order in {**orders, AT_RANDOM: half}.items():
                subspace = clean.shards(order[:count]).subspace(rank, per_head=per_head)
                here = {"fault": fault, "share": share, "draw": draw}
                rows += agreement(subspace, held_out, rank, {**here, "of": "subspace"})
            rows += agreement(floor, held_out, rank, {"fault": "none", "share": share, "draw": draw, "of": "random"})
    return pd.DataFrame(rows)


def summarise(frame: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """The mean over heads, then the mean, the lowest and the highest over draws.

    Columns `site, layer, kind, *by, of, measure, value, low, high`.
    """
    keys = ["site", "layer", "kind", *by, "of", "measure"]
    per_draw = frame.groupby([*keys, "draw"], as_index=False).value.mean()
    return per_draw.groupby(keys).value.agg(value="mean", low="min", high="max").reset_index()


def faults_figure(frame: pd.DataFrame, x: str) -> go.Figure:
    """A line for each fault over its share: the mean over sites and heads, in a band from lowest to highest draw."""
    part = frame[frame.measure == ENERGY].assign(site="all", layer=-1, kind="all")
    table = summarise(part, ["fault", "share"])
    fig = figure(
        f"What spoils a calibration: {ENERGY} of the other, clean half",
        x,
        ENERGY,
        says="mean over sites and heads; bands: range over divisions into halves; grey: controls",
    )
    controls = (LEFT_OUT, AT_RANDOM)
    names = [name for name in dict.fromkeys(frame.fault) if name not in (*controls, "none")]
    floor = table[table.of == "random"]
    line(fig, floor.share, floor.value, "random subspaces", null=True, mode="lines")
    for control in controls:
        mine = table[table.fault == control]
        if not mine.empty:
            band(fig, mine.share, mine.low, mine.high, null=True)
            line(fig, mine.share, mine.value, control, null=True, symbol="square-open")
    for index, name in enumerate(names):
        mine = table[table.fault == name]
        band(fig, mine.share, mine.low, mine.high, index=index)
        line(fig, mine.share, mine.value, name, index=index)
    fig.update_yaxes(range=[max(0.0, table.low.min() - 0.05), 1.01])  # what matters lies between floor and ceiling
    fig.update_xaxes(tickformat=".0%", range=[-0.03, 1.03])
    return fig


def faults_sentence(frame: pd.DataFrame) -> str:
    """What the energy share says of each fault, against its control, the ceiling and the floor."""
    energy = frame[frame.measure == ENERGY]
    draws = energy.groupby(["of", "fault", "share", "draw"]).value.mean()
    chosen = AT_RANDOM in set(frame.fault)
    control = draws["subspace"][AT_RANDOM if chosen else LEFT_OUT]
    ceiling = control[1.0 if chosen else 0.0].mean()
    parts = []
    for fault in dict.fromkeys(energy.fault[energy.of == "subspace"]):
        if fault in (AT_RANDOM, LEFT_OUT):
            continue
        mine = draws["subspace"][fault]
        share = mine.index.get_level_values("share").min() if chosen else mine.index.get_level_values("share").max()
        text = f"{fault} {share:.0%}: {mine[share].mean():.3f} [{mine[share].min():.3f}, {mine[share].max():.3f}]"
        if chosen:
            text += f" (as many at random: {control[share].mean():.3f})"
        parts.append(text)
    floor = draws["random"].mean()
    return (
        f"Energy share of a clean half: {'; '.join(parts)}; half-split ceiling {ceiling:.3f}, random floor "
        f"{floor:.3f} (ranges over divisions into halves)."
    )


def per_shard(moments: GradientMoments) -> int:
    """Number of examples per shard; `SPDError` unless all shards have equally many and there are at least two."""
    counts = moments.n_examples
    if len(counts) < 2 or (counts != counts[0]).any() or not counts[0]:
        raise SPDError(
            f"{int(counts.sum())} examples in {len(counts)} shards cannot be divided evenly; extract with shards=N "
            "where N, at least 2, divides the number of examples"
        )
    return int(counts[0])


def _halves(n: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    order = rng.permutation(n).tolist()
    return order[: n // 2], order[n // 2 :]


def _ordered(half: list[int], values: Sequence[float | str], rng: np.random.Generator) -> list[int]:
    groups = sorted({value for value in values if isinstance(value, str)})
    turn = dict(zip(groups, rng.permutation(len(groups)).tolist(), strict=True))
    numbers = [turn[value] if isinstance(value, str) else value for value in values]
    return sorted(half, key=lambda i: numbers[i])  # stable, so ties stay in random order


def _check_shares(shares: Sequence[float]) -> None:
    for share in shares:
        if not 0 <= share <= 1:
            raise SPDError(f"share {share} does not lie between 0 and 1")
