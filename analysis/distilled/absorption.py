"""How much of the projected behaviour a LoRA absorbed: KL from the projected policy before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from spd_lens.analysis.common import NULL_COLOR, figure, line
from spd_lens.errors import SPDError
from spd_lens.evaluation import ForcedBatch, ForcedPasses
from spd_lens.examples import Example
from spd_lens.models import ModelPair, batches_by_length, kl_divergence, neutrally
from spd_lens.stats import Estimate, bootstrap_ends, paired_difference, verdict
from spd_lens.subspaces import Policy, Subspace

PROJECTED = "projected"
"""The control `of` the absorption that is the subspace itself; the others are random subspaces."""

_BATCH_TOKENS = 512
"""Padded tokens per batch. Three float32 rows of the vocabulary per completion token are in memory."""


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
    progress: bool = True,
) -> pd.DataFrame:
    """Does training move the model towards its projected self: KL(projected || tuned) against KL(projected || base).

    Teacher-forced on the items' completions. The control is the same towards random projections of the same ranks,
    which the tuned model was never shown. What moves it there too is not absorption.

    Args:
        pair: The base model.
        items: Held-out examples with completion and spans.
        subspace: The subspace that the corpus was generated under.
        adapter: The adapter that was trained on that corpus.
        strength: Strength of the projection.
        n_random: Number of random subspaces.
        seed: Seed of the random subspaces.
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
    trained = Policy("tuned", adapter=adapter)
    passes, rows = ForcedPasses(pair, [one.first_layer(pair) for one in (trained, *policies)]), []
    with tqdm(total=len(items), desc="absorption", unit="item", disable=not progress) as bar:
        for indices in batches_by_length([len(e.ids) for e in encoded], _BATCH_TOKENS):
            batch = ForcedBatch.of([encoded[i] for i in indices], pair)
            base, tuned = passes.base(batch), passes.under(trained)
            for policy in policies:
                logits = passes.under(policy)
                to_base, to_tuned = kl_divergence(logits, base), kl_divergence(logits, tuned)
                for i, index in enumerate(indices):
                    mine = batch.of_completion(i)
                    kl = {"kl_base": to_base[mine].mean().item(), "kl_tuned": to_tuned[mine].mean().item()}
                    rows.append({"item": items[index].id or str(index), "of": policy.name, **kl})
            bar.update(len(indices))
    return pd.DataFrame(rows).sort_values(["of", "item"], ignore_index=True)


def absorbed(frame: pd.DataFrame, *, seed: int = 0) -> dict[str, Estimate]:
    """Estimates that follow from `absorption`, with 95 % intervals over items.

    `"KL"` is the paired change KL(projected || tuned) - KL(projected || base) in nats per token. `"share"` is
    `1 - Σ KL(projected || tuned) / Σ KL(projected || base)`: 1 where the tuned model is the projected one, 0 where
    training brought it no nearer. `"random KL"`, `"random share"` are the same for the mean over random subspaces, and
    `"share beyond random"` the difference of the two shares. Shares have a percentile bootstrap over items.
    """
    own, random = (_per_item(frame, null) for null in (False, True))
    found: dict[str, Estimate] = {}
    for name, table in (("", own), ("random ", random)):
        if len(table):
            found[f"{name}KL"] = paired_difference(*table.T)
            found[f"{name}share"] = _bootstrapped(_share, table, seed)
    if len(random):
        found["share beyond random"] = _bootstrapped(_share_beyond, np.hstack([own, random]), seed)
    return found


def _per_item(frame: pd.DataFrame, null: bool) -> Float[np.ndarray, "item 2"]:
    """`kl_base` and `kl_tuned` of each item, towards the projection or averaged over the random ones."""
    part = frame[(frame.of != PROJECTED) == null]
    return part.groupby("item")[["kl_base", "kl_tuned"]].mean().sort_index().to_numpy()


def _share(kl_base: Any, kl_tuned: Any, axis: int = -1) -> Any:
    return 1 - kl_tuned.sum(axis=axis) / kl_base.sum(axis=axis)


def _share_beyond(kl_base: Any, kl_tuned: Any, random_base: Any, random_tuned: Any, axis: int = -1) -> Any:
    return _share(kl_base, kl_tuned, axis) - _share(random_base, random_tuned, axis)


def _bootstrapped(statistic: Any, table: Float[np.ndarray, "item column"], seed: int) -> Estimate:
    value, n = float(statistic(*table.T)), len(table)
    if n < 2:
        return Estimate(value, -float("inf"), float("inf"), n, "one item, no interval")
    low, high = bootstrap_ends(list(table.T), statistic, n_resamples=2000, seed=seed)
    return Estimate(value, low, high, n, "percentile bootstrap over items 95%")


def absorption_figure(frame: pd.DataFrame) -> go.Figure:
    """A point per item: by how much training lowered its KL from the projected policy, beside random projections."""
    fig = figure(
        "Did training move the model towards its projected self?",
        "projection",
        "fall of the KL<br>(nats per token)",
        says="KL(projected || base) minus KL(projected || tuned), a point per held-out item; bars: mean, 95 % "
        "interval; above 0: nearer",
    )
    for null, name in ((False, "the subspace"), (True, "random subspaces")):
        part = frame[(frame.of != PROJECTED) == null]
        if part.empty:
            continue
        gain = (part.kl_base - part.kl_tuned).groupby(part.item).mean()
        line(fig, [name] * len(gain), gain, f"{name}: items", null=null, mode="markers", text=list(gain.index))
        fig.data[-1].update(marker={"opacity": 0.4, "size": 6})
        mean = paired_difference(*_per_item(frame, null).T)
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
    found = verdict(beyond)
    said = {"too few items": "too few items to say", "higher": "more than towards random ones"}
    said["lower"] = "less than towards random ones"
    return f"{text}: {said.get(found, found)}."
