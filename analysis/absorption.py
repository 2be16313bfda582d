"""How much of the projected behaviour a LoRA absorbed: KL from the projected policy before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from scipy import stats
from tqdm.auto import tqdm

from spd_lens.errors import SPDError
from spd_lens.estimate import Estimate
from spd_lens.evaluation import Policy
from spd_lens.evaluation.forced import ForcedBatch, forced_logits
from spd_lens.examples import Example
from spd_lens.models import ModelPair
from spd_lens.models.batches import batches_by_length
from spd_lens.models.neutral import neutrally
from spd_lens.models.parity import kl_divergence
from spd_lens.statistics import paired_difference
from spd_lens.subspace import Subspace

from .style import NULL_COLOR, figure, line

PROJECTED = "projected"
"""The control `of` the absorption that is the subspace itself; the others are random subspaces."""


@neutrally
@torch.no_grad()
def absorption(
    pair: ModelPair,
    items: Sequence[Example],
    subspace: Subspace,
    adapter: str | Path,
    *,
    strength: float = 1.0,
    n_random: int = 5,
    seed: int = 0,
    batch_tokens: int = 512,
    progress: bool = True,
) -> pd.DataFrame:
    """Does training move the model towards its projected self: KL(projected || tuned) against KL(projected || base).

    Teacher-forced on the items' completions. The control: the same towards random projections of the same ranks,
    which the tuned model was never shown. What moves it there too is not absorption.

    Args:
        pair: The base model.
        items: Held-out examples with completion and spans.
        subspace: What the corpus was generated under.
        adapter: What was trained on that corpus.
        strength: Of the projection.
        n_random: Random subspaces.
        seed: Of the random subspaces.
        batch_tokens: Padded tokens per batch; three float32 rows of the vocabulary per completion token are in memory.
        progress: Show a progress bar.

    Returns:
        A row per item and projection: columns `item, of` (`"projected"`, `"random-0"`, ...), `kl_base, kl_tuned`: means
        over the completion's tokens, in nats, of KL(projected || base) and KL(projected || tuned).
    """
    if not items:
        raise SPDError("there are no items to compare the policies on; give at least one")
    policies = [Policy(PROJECTED, subspace, strength)]
    policies += [Policy(f"random-{i}", subspace.random_like(seed + i), strength) for i in range(n_random)]
    encoded = [pair.encode(item) for item in items]
    rows = []
    with tqdm(total=len(items), desc="absorption", unit="item", disable=not progress) as bar:
        for indices in batches_by_length([len(e.ids) for e in encoded], batch_tokens):
            batch = ForcedBatch.of([encoded[i] for i in indices], pair)
            base = forced_logits(pair, pair.hf, batch)
            with Policy("tuned", adapter=adapter).applied(pair) as model:
                tuned = forced_logits(pair, model, batch)
            for policy in policies:
                with policy.applied(pair) as model:
                    logits = forced_logits(pair, model, batch)
                to_base, to_tuned = kl_divergence(logits, base), kl_divergence(logits, tuned)
                for i, index in enumerate(indices):
                    mine = batch.row == i
                    kl = {"kl_base": to_base[mine].mean().item(), "kl_tuned": to_tuned[mine].mean().item()}
                    rows.append({"item": items[index].id or str(index), "of": policy.name, **kl})
            bar.update(len(indices))
    return pd.DataFrame(rows).sort_values(["of", "item"], ignore_index=True)


def absorbed(frame: pd.DataFrame, *, seed: int = 0, n_resamples: int = 2000) -> dict[str, Estimate]:
    """Estimates that follow from `absorption`, with 95 % intervals over items.

    `"KL"` is the paired change KL(projected || tuned) - KL(projected || base) in nats per token. `"share"` is
    `1 - Σ KL(projected || tuned) / Σ KL(projected || base)`: 1 where the tuned model is the projected one, 0 where
    training brought it no nearer. `"random KL"`, `"random share"` are the same for the mean over random subspaces, and
    `"share beyond random"` the difference of the two shares. Shares have a percentile bootstrap over items.
    """
    sums = {}
    for name, part in (("", frame[frame.of == PROJECTED]), ("random ", frame[frame.of != PROJECTED])):
        if len(part):
            sums[name] = part.groupby("item")[["kl_base", "kl_tuned"]].mean().sort_index().to_numpy()
    found: dict[str, Estimate] = {}
    for name, table in sums.items():
        found[f"{name}KL"] = paired_difference(table[:, 0], table[:, 1])
        found[f"{name}share"] = _bootstrapped(_share, list(table.T), seed, n_resamples)
    if "random " in sums:
        columns = [*sums[""].T, *sums["random "].T]

        def beyond(a: Any, b: Any, c: Any, d: Any, axis: int = -1) -> Any:
            return _share(a, b, axis=axis) - _share(c, d, axis=axis)

        found["share beyond random"] = _bootstrapped(beyond, columns, seed, n_resamples)
    return found


def _share(kl_base: Any, kl_tuned: Any, axis: int = -1) -> Any:
    return 1 - kl_tuned.sum(axis=axis) / kl_base.sum(axis=axis)


def _bootstrapped(statistic: Any, columns: list[Any], seed: int, n_resamples: int) -> Estimate:
    value, n = float(statistic(*columns)), len(columns[0])
    if n < 2:
        return Estimate(value, -float("inf"), float("inf"), n, "one item, no interval")
    found = stats.bootstrap(
        tuple(columns), statistic, paired=True, method="percentile", n_resamples=n_resamples,
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Estimate(value, float(found.low), float(found.high), n, "percentile bootstrap over items 95%")


def absorption_figure(frame: pd.DataFrame) -> go.Figure:
    """A point per item: by how much training lowered its KL from the projected policy, beside random projections."""
    fig = figure(
        "Did training move the model towards its projected self?",
        "projection",
        "fall of the KL<br>(nats per token)",
        says="KL(projected || base) minus KL(projected || tuned), a point per held-out item; bars: mean, 95 % "
        "interval; above 0: nearer",
    )
    estimates = absorbed(frame)
    for null, name, key in ((False, "the subspace", "KL"), (True, "random subspaces", "random KL")):
        part = frame[(frame.of == PROJECTED) != null]
        if part.empty:
            continue
        gain = (part.kl_base - part.kl_tuned).groupby(part.item).mean()
        line(fig, [name] * len(gain), gain, f"{name}: items", null=null, mode="markers", text=list(gain.index))
        fig.data[-1].update(marker={"opacity": 0.4, "size": 6})
        mean = estimates[key]
        error: dict[str, Any] | None = None
        if mean.bounded:  # the estimate is of tuned minus base, the figure shows base minus tuned
            error = {"type": "data", "array": [mean.value - mean.low], "arrayminus": [mean.high - mean.value]}
            error |= {"thickness": 2.5, "width": 14}
        line(fig, [name], [-mean.value], f"{name}: mean", null=null, mode="markers", error_y=error)
        fig.data[-1].update(marker={"symbol": "diamond", "size": 12})
    fig.add_hline(y=0, line={"color": NULL_COLOR, "width": 1})
    fig.update_xaxes(range=[-0.6, 1.6])
    return fig


def absorption_sentence(estimates: Mapping[str, Estimate]) -> str:
    """How much of the way to the projected policy was gone, and whether that is more than towards random ones."""
    share = estimates["share"]
    text = f"Of the KL from the projected policy, training closed a share of {share}"
    if share.bounded and share.high < 0:
        text += ", which is to say that it moved away from it"
    if "share beyond random" not in estimates:
        return f"{text}; no random projections to compare with."
    beyond = estimates["share beyond random"]
    text += f"; towards random projections {estimates['random share']}; difference {beyond}"
    if not beyond.bounded:
        return f"{text}: too few items to say."
    if beyond.low <= 0 <= beyond.high:
        return f"{text}: within noise."
    return f"{text}: {'more' if beyond.value > 0 else 'less'} than towards random ones."
