"""Means and paired differences of a study, with intervals over items and p-values corrected for their number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from spd_lens.evaluation import OUTCOMES
from spd_lens.stats import (
    TOO_FEW,
    WITHIN_NOISE,
    Estimate,
    clustered_difference,
    clustered_mean,
    holm,
    sign_flip,
    verdict,
)
from spd_lens.study.config import BASE
from spd_lens.study.reporting.evidence import PRIMARY, Evidence, Outcome

FOCUS, RANDOM = "spd", "spd-random"
ALPHA = 0.05
N_RESAMPLES = 4999
MIN_FLIPS = 9999
FLIPS_PER_COMPARISON = 200
"""Sign flips per test and member of its family: the smallest possible p-value is then still below 5 % after correction,
however many comparisons there are."""
NOT_EVERY_SEED = "not in every seed"
BETTER = {
    **{heading: -1 for outcome, heading in OUTCOMES.items() if outcome.endswith("_loss")},
    "accuracy": 1, "accuracy by likelihood": 1, "token accuracy": 1, "format": 1, "finished": 1,
}  # fmt: skip
"""1 where a higher value is better, -1 where a lower one is. KL from base and length only say how much changed."""


def means(evidence: Evidence) -> pd.DataFrame:
    """The mean of every measure with its interval over items.

    Returns:
        Columns `source, target, role, phase, method, measure, value, low, high, n, n_seeds`; `n` counts items. `low`
        and `high` are NaN where the data allow no interval.
    """
    known: dict[Outcome, dict[str, Any]] = {}  # the base has one mean for all sources and phases
    rows = []
    for outcome in evidence.outcomes():
        table = evidence.scores(outcome)
        if table is not None and table.size:
            if outcome.home not in known:
                known[outcome.home] = clustered_mean(table.to_numpy(), n_resamples=N_RESAMPLES).to_row()
            rows.append({**outcome._asdict(), **known[outcome.home], "n_seeds": len(table)})
    return pd.DataFrame(rows, columns=[*Outcome._fields, "value", "low", "high", "n", "n_seeds"])


def differences(
    evidence: Evidence, *, n_resamples: int = N_RESAMPLES, min_flips: int = MIN_FLIPS, seed: int = 0
) -> pd.DataFrame:
    """Paired differences of every method to the base and to `spd-random`, and of `spd` to every method.

    Seeds are averaged per item, intervals are bootstraps over items, p-values are from sign flips over items, corrected
    by Holm within two families: the primary outcomes on targets, and everything else. KL has no difference to the base:
    it is one.

    Args:
        evidence: The study.
        n_resamples: Number of resamples of the bootstrap.
        min_flips: Number of sign flips per test; a large family gets more.
        seed: Seed of bootstrap and flips.

    Returns:
        Columns `source, target, role, phase, method, measure, reference, family, value, low, high, n, n_dropped,
        n_seeds, seeds_low, seeds_high, p, p_holm, verdict`. `value` is method minus reference; `n_dropped` counts
        items that some seed of the two lacks; `seeds_low`, `seeds_high` are the range of the difference over seeds;
        `verdict` is `"higher"`, `"lower"`, `"not in every seed"`, `"within noise"`, or `"too few items"` to be told
        from noise in so large a family, whatever they show.
    """
    rows = []
    for outcome in evidence.outcomes():
        for reference in references(outcome.method, evidence.methods):
            if not (outcome.measure == "KL from base" and reference == BASE):
                row = _difference(evidence, outcome, reference, n_resamples, seed)
                rows += [row] if row else []
    for family in ("primary", "secondary"):
        members = [row for row in rows if row["family"] == family]
        flips = max(min_flips, FLIPS_PER_COMPARISON * len(members))
        for row in members:
            row["p"] = sign_flip(row.pop("by_item"), n_flips=flips, seed=seed)
        for row, p in zip(members, holm([row["p"] for row in members]), strict=True):
            row["p_holm"] = p
            row["verdict"] = _verdict(row, len(members))
    names = ["reference", "family", "value", "low", "high", "n", "n_dropped", "n_seeds", "seeds_low", "seeds_high"]
    return pd.DataFrame(rows, columns=[*Outcome._fields, *names, "p", "p_holm", "verdict"])


def references(method: str, others: Sequence[str]) -> list[str]:
    """What a method is compared with: the base and `spd-random`; `spd` is compared with every method of the study."""
    if method == BASE:
        return []
    wanted = others if method == FOCUS else [BASE, RANDOM]
    return [other for other in wanted if other in others and other != method]


def better(measure: str, direction: str) -> str:
    """`"better"` or `"worse"` for a measure that went `"higher"` or `"lower"`; empty where there is no better."""
    sign = {"higher": 1, "lower": -1}.get(direction, 0) * BETTER.get(measure, 0)
    return {1: "better", -1: "worse", 0: ""}[sign]


def estimate_of(row: Mapping[str, Any]) -> Estimate:
    """The estimate that a row of either table holds."""
    low, high = row["low"], row["high"]
    unbounded = low is None or math.isnan(low)
    return Estimate(row["value"], -math.inf if unbounded else low, math.inf if unbounded else high, int(row["n"]), "")


def _difference(
    evidence: Evidence, outcome: Outcome, reference: str, n_resamples: int, seed: int
) -> dict[str, Any] | None:
    other = outcome._replace(method=reference)
    mine, theirs = evidence.scores(outcome), evidence.scores(other)
    if mine is None or theirs is None or (items := mine.columns.intersection(theirs.columns)).empty:
        return None
    a, b = theirs[items], mine[items]
    estimate = clustered_difference(a.to_numpy(), b.to_numpy(), n_resamples=n_resamples, seed=seed)
    before, after = a.mean(axis=1), b.mean(axis=1)
    # the mean difference under each seed that both have; the base has one mean for all seeds
    by_seed = after - before.iloc[0] if reference == BASE else (after - before).dropna()
    primary = outcome.measure in PRIMARY and outcome.role == "target"
    return {
        **outcome._asdict(),
        "reference": reference,
        "family": "primary" if primary else "secondary",
        **estimate.to_row(),
        "n_dropped": len(evidence.items(outcome) | evidence.items(other)) - len(items),
        "n_seeds": len(b),
        "seeds_low": min(map(float, by_seed), default=None),
        "seeds_high": max(map(float, by_seed), default=None),
        "by_item": (b.mean() - a.mean()).to_numpy(),
    }


def _verdict(row: Mapping[str, Any], n_comparisons: int) -> str:
    """A direction is claimed only where interval, corrected test and every single seed agree on it."""
    found = verdict(estimate_of(row))
    if found == TOO_FEW:
        return found
    if found == WITHIN_NOISE or row["p_holm"] > ALPHA:
        # the smallest p-value that n items can have is that of all signs alike: where even that is too large, say so
        return WITHIN_NOISE if 2.0 ** (1 - row["n"]) * n_comparisons <= ALPHA else TOO_FEW
    low, high = row["seeds_low"], row["seeds_high"]
    return NOT_EVERY_SEED if low is not None and low <= 0 <= high else found
