"""A change of the score, split into what stands in the answer, where it stands, and what stands behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from spd_lens.analysis.gain.completions import COMPONENTS, RATES
from spd_lens.stats import Estimate, clustered_difference, clustered_mean, holm, sign_flip
from spd_lens.study import BASE

PARTS = ("score", *COMPONENTS)
QUANTITIES = (*PARTS, *RATES, "tokens")
N_RESAMPLES, MIN_FLIPS, FLIPS_PER_TEST = 4999, 9999, 200
"""As in a study's report: sign flips per test grow with the family, so that a p-value can survive the correction."""
COLUMNS = [
    "study", "source", "target", "scorer", "own", "method", "quantity", "value", "low", "high", "gain", "gain_low",
    "gain_high", "n", "n_seeds", "p", "p_holm",
]  # fmt: skip

Table = np.ndarray
"""`[seed, item]`."""


def split(frame: pd.DataFrame) -> pd.DataFrame:
    """Means of every score, component and rate, and their paired differences to the base model.

    Seeds are averaged per item; intervals are bootstraps over items (95 %). The differences of `rest`, `format` and
    `stopping` add up to that of `score`. p-values are of sign flips over items and are corrected (Holm) over the scores
    and components of the whole table; rates have intervals alone. Where no completion has anything of a component, its
    difference is 0 and has no interval: nothing was estimated.

    Args:
        frame: From `completions`.

    Returns:
        A row for every study, source, target, scorer, method and quantity, with the columns of `COLUMNS`; rows of the
        base model are repeated for each source and have no gain.
    """
    rows: list[dict[str, Any]] = []
    for (study, target, scorer), part in frame.groupby(["study", "target", "scorer"], sort=False):
        own = bool(part.own.iloc[0])
        base = tables(part[part.method == BASE])
        levels = {name: _level(table) for name, table in base.items()}
        for source, trained in part[part.method != BASE].groupby("source", sort=False):
            place = {"study": study, "source": source, "target": target, "scorer": scorer, "own": own}
            for name, level in levels.items():
                rows.append({**place, "method": BASE, "quantity": name, **level, "n_seeds": 1})
            for method, of_method in trained.groupby("method", sort=False):
                rows += [{**place, "method": method, **row} for row in _against(base, tables(of_method))]
    _correct(rows)
    return pd.DataFrame(rows, columns=COLUMNS)


def tables(rows: pd.DataFrame) -> dict[str, Table]:
    """Every quantity of one method as `[seed, item]`, items in the order of their names."""
    seeds = rows.seed.nunique()
    ordered = rows.sort_values(["seed", "item"], kind="stable")
    return {name: ordered[name].to_numpy(dtype=np.float64).reshape(seeds, -1) for name in QUANTITIES}


def difference(base: Table, trained: Table) -> Estimate:
    """Mean difference with its interval over items; none where neither has anything but zeros."""
    if not base.any() and not trained.any():
        return Estimate(0.0, -np.inf, np.inf, base.shape[1], "no completion has any of it")
    return clustered_difference(base, trained, n_resamples=N_RESAMPLES)


def _against(base: Mapping[str, Table], trained: Mapping[str, Table]) -> Iterator[dict[str, Any]]:
    for name in QUANTITIES:
        found = difference(base[name], trained[name]).to_row()
        gain = {"gain": found["value"], "gain_low": found["low"], "gain_high": found["high"]}
        by_item = trained[name].mean(axis=0) - base[name].mean(axis=0)
        level = _level(trained[name])
        yield {"quantity": name, **level, **gain, "n_seeds": len(trained[name]), "by_item": by_item}


def _level(table: Table) -> dict[str, Any]:
    return clustered_mean(table, n_resamples=N_RESAMPLES).to_row()


def _correct(rows: list[dict[str, Any]]) -> None:
    """Put p-values on the differences of scores and components."""
    compared = [row for row in rows if row["method"] != BASE and row["quantity"] in PARTS]
    family = [row for row in compared if row["gain_low"] is not None or row["gain"]]  # else nothing was estimated
    p_values = flipped([row["by_item"] for row in family])
    for row, (p, p_holm) in zip(family, p_values, strict=True):
        row["p"], row["p_holm"] = p, p_holm


def flipped(family: list[np.ndarray]) -> list[tuple[float, float]]:
    """The p-value of each mean difference, and the same corrected for the size of the family (Holm)."""
    flips = max(MIN_FLIPS, FLIPS_PER_TEST * len(family))
    p_values = [sign_flip(by_item, n_flips=flips) for by_item in family]
    return list(zip(p_values, holm(p_values), strict=True))
