"""`recommend`: layers and rank from a sweep's table, with the reason; or that the data support no choice."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from spd_lens.analysis.common import deciding
from spd_lens.analysis.sweeps.store import MEASURES
from spd_lens.errors import SPDError
from spd_lens.stats import bracketed

KL_BUDGET = 0.1
"""Nats per token. SmolLM2 at the paper's setting (last and middle layer, half rank) stays just below it."""

ALPHA = 0.05
"""Level of the tests, which Holm's correction makes that of all cells together."""


@dataclass(frozen=True)
class Recommendation:
    """A cell to use, or None, and why."""

    cell: str | None
    reason: str
    passed: tuple[str, ...] = ()
    """All cells that met the conditions, lowest loss first."""


def recommend(table: pd.DataFrame, *, kl_budget: float = KL_BUDGET, default: str | None = None) -> Recommendation:
    """The rule, fixed before looking. It goes by one loss: that on results, where the items have computed results, else
    the aligned loss, which copying from the completion can lower.

    1. the KL from the base model on held-out gold completions is at most `kl_budget` nats per token;
    2. the loss is lower than under random subspaces of the same ranks at the same sites, with `p_holm < 0.05`,
       corrected over **all** cells of the table;
    3. of the cells that meet both, the one with the lowest loss.

    Args:
        table: The table of `Sweep.table`.
        kl_budget: Largest KL, in nats per token.
        default: Name of the cell to fall back on, the paper's setting for instance.
    """
    if not kl_budget > 0:
        raise SPDError(f"a KL budget must be above 0 nats, but is {kl_budget}")
    by = deciding(set(table["measure"]))
    name, loss = MEASURES[by], _measure(table, by)
    kl = _measure(table, "kl")
    within = kl["value"] <= kl_budget
    better = (loss["difference"] < 0) & (loss["p_holm"] < ALPHA)
    passed = loss[within & better].sort_values("value")
    if passed.empty:
        return Recommendation(None, _none(name, loss, kl, within, better, kl_budget, default))
    best = passed.iloc[0]
    cell, n = str(best.name), len(passed)
    others = "it is the only one" if n == 1 else f"of {n} such cells it has the lowest {name}"
    reason = (
        f"{describe(best)}: {others} with KL at most {kl_budget:g} nats and {_a(name)} below that of random "
        f"subspaces of its shape (difference {_interval(best, 'difference')} nats, Holm p = {best['p_holm']:.2g} over "
        f"{len(loss)} cells). {_change(name, best)}; KL {kl.loc[cell, 'value']:.3f}, under random subspaces "
        f"{kl.loc[cell, 'random']:.3f}.{_matched(best)} The difference is flattered by having been chosen: "
        "trust the measurement on fresh items."
    )
    return Recommendation(cell, reason, tuple(map(str, passed.index)))


def describe(row: pd.Series) -> str:
    """A cell in words."""
    head = "" if row["head"] == "all" else f", head {row['head']}"
    how = str(row["projector"]).replace("_", " ")
    return f"layers {row['layers']}, {row['kind']}{head}, {how}, rank {row['rank']} of {row['width']}"


def overall(table: pd.DataFrame, measure: str, placebo: pd.DataFrame | None = None) -> str:
    """How often the cells of a sweep beat random, and how often chance would.

    Being lowest of `R + 1` needs no assumption on how draws scatter: chance does it in one of `R + 1`. As ranks of the
    same layers overlap, the count over cells is no test. Holm's count assumes more; the placebo says whether too much.

    Args:
        table: The table of `Sweep.table`.
        measure: A key of `MEASURES` that the table has.
        placebo: The table of `Sweep.placebo` for the same measure; without it only the first count is given.
    """
    rows = _measure(table, measure)
    lowest = int((rows["value"] < rows["random_low"]).sum())
    chance = float((1 / (rows["n_random"] + 1)).sum())
    text = (
        f"{MEASURES[measure]} is lower than under every random subspace of the same shape in {lowest} of {len(rows)} "
        f"cells (chance: {chance:g})"
    )
    if placebo is None:
        return f"{text[0].upper()}{text[1:]}."
    lower = int(((rows["difference"] < 0) & (rows["p_holm"] < ALPHA)).sum())
    higher = int(((rows["difference"] > 0) & (rows["p_holm"] < ALPHA)).sum())
    false = int((placebo["p_holm"] < ALPHA).sum())
    return (
        f"{text[0].upper()}{text[1:]}; lower beyond noise in {lower} and higher in {higher} (Holm), where the same "
        f"test takes {false} of {len(placebo)} random subspaces for different from their fellows."
    )


def _none(
    name: str,
    loss: pd.DataFrame,
    kl: pd.DataFrame,
    within: pd.Series,
    better: pd.Series,
    budget: float,
    default: str | None,
) -> str:
    if better.any():
        n = int(better.sum())
        mildest = loss.loc[kl["value"][better].idxmin()]
        text = (
            f"No cell qualifies: {n} of {len(loss)} have {_a(name)} below that of random subspaces of their shape "
            f"beyond noise, but none of them keeps KL within {budget:g} nats (the mildest, {describe(mildest)}, has "
            f"{kl.loc[mildest.name, 'value']:.3f})."
        )
    else:
        worse = int(((loss["difference"] > 0) & (loss["p_holm"] < ALPHA)).sum())
        text = (
            f"No cell beats random subspaces of its shape beyond noise: of {len(loss)} cells the smallest "
            f"Holm-corrected p for a lower {name} is {_smallest_p(loss)}"
            + (f", while {worse} are significantly worse than random." if worse else ".")
        )
    if within.any():
        smallest = loss[within].sort_values(["rank", "width"]).iloc[0]
        text += f" The smallest rank within a KL of {budget:g} nats is {describe(smallest)}."
    else:
        text += f" No cell stays within a KL of {budget:g} nats."
    if default is not None and default in loss.index:
        row = loss.loc[default]
        text += (
            f" Keep the run's own setting ({describe(row)}) for comparability: {_change(name, row).lower()}; random "
            f"subspaces of its shape: {row['random']:+.3f}, from {row['random_low']:+.3f} to {row['random_high']:+.3f}."
        )
    else:
        text += " Keep the paper's default (last_mid, k and v, half rank) for comparability."
    return text


def _smallest_p(loss: pd.DataFrame) -> str:
    lower = loss.loc[loss["difference"] < 0, "p_holm"]
    return "not to be had, since none is lower" if lower.empty else f"{lower.min():.2g}"


def _change(name: str, row: pd.Series) -> str:
    """What a cell does to the loss, against the base model."""
    if row["low"] <= 0 <= row["high"]:
        verdict = "within noise of the base model"
    else:
        verdict = "below the base model" if row["value"] < 0 else "above the base model"
    return f"{name.capitalize()} changes by {_interval(row, 'value')} nats, {verdict}"


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _matched(row: pd.Series) -> str:
    if pd.isna(row["matched"]):
        return " No random subspace of this sweep did as much damage, so there is no comparison at equal KL."
    verdict = "within noise" if row["matched_low"] <= 0 <= row["matched_high"] else "beyond noise"
    return f" Against random subspaces of the same KL: {_interval(row, 'matched')} nats, {verdict}."


def _interval(row: pd.Series, name: str) -> str:
    ends = "" if name == "value" else f"{name}_"
    return bracketed(row[name], row[f"{ends}low"], row[f"{ends}high"], sign="+")


def _measure(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    rows = table[table["measure"] == measure].set_index("cell")
    if rows.empty:
        raise SPDError(f"the table holds no {measure}; give the table of a sweep")
    return rows
