"""From cells to differences: every entrant against the base model, random subspaces and the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from spd_lens.analysis.estimators.engine import Held
from spd_lens.analysis.estimators.settings import OWN, PAPER, RANDOM, Entrant
from spd_lens.errors import SPDError
from spd_lens.evaluation import OUTCOMES
from spd_lens.stats import crossed_differences

BASE = "base"
ACCURACY = "accuracy"
"""The outcome of greedy answers: the share that is right."""
Values = Mapping[Entrant | None, Float[np.ndarray, "draw item"]]
"""What the draws of every entrant did to each item; None is the base model, which has one row."""
COLUMNS = (
    "place", "model", "task", "estimator", "span", "rank", "outcome", "primary", "against", "value", "low", "high", "p",
    "se", "p_holm", "detectable", "shown", "n_items", "n_draws",
)  # fmt: skip


def primary(held: Held) -> str:
    """The outcome that decides: results, which cannot be had by copying; the aligned loss where a task has none."""
    return "results_loss" if np.isfinite(held.values(None, "results_loss")).sum() > 1 else "aligned_loss"


def differences(held: Held) -> pd.DataFrame:
    """Every entrant minus the base model, random subspaces of its rank, and the paper's subspace of its rank.

    Entrants of which some draw did not reach the KL are left out, and so are items that an outcome does not exist for.
    `p_holm` and `detectable` are corrected over all differences of one outcome to random and to the paper's; those to
    the base model only say how large the effects are, and have neither.

    Returns:
        Columns `place, model, task, estimator, span, rank, outcome, primary, against, value, low, high, p, se, p_holm,
        detectable, shown, n_items, n_draws`. `value` is a mean over items and draws in nats per token (`token_accuracy`
        is a share), `low` and `high` the ends of its 95 % interval over both.
    """
    rows: list[dict[str, Any]] = []
    first = primary(held)
    everyone = [*held.contest.entrants(), *(Entrant(RANDOM, OWN, rank) for rank in held.contest.ranks)]
    for outcome in OUTCOMES:
        values = {one: found for one in (None, *everyone) if (found := held.values(one, outcome)) is not None}
        rows += [{**row, "outcome": outcome, "primary": outcome == first} for row in _compared(held, values)]
    if not rows:
        raise SPDError(f"no entrant moves {held.pair.name} as far as a KL of {held.contest.kl:g}; ask for a lower one")
    return pd.DataFrame(rows, columns=COLUMNS).fillna({"shown": ""})


def accuracy_differences(held: Held, scores: Values) -> pd.DataFrame:
    """The same of the accuracy of greedy answers, which is a family of its own; no rows from a single draw."""
    scores = {one: found for one, found in scores.items() if one is None or len(found) > 1}
    rows = [{**row, "outcome": ACCURACY, "primary": False} for row in _compared(held, scores)] if scores else []
    return pd.DataFrame(rows, columns=COLUMNS).fillna({"shown": ""})


def _compared(held: Held, values: Values) -> list[dict[str, Any]]:
    """Everyone minus base, random and paper in one outcome; those to random and paper as one family of tests."""
    there = np.isfinite(values[None][0])
    if there.sum() < 2:
        return []
    measured = {one: found[:, there] for one, found in values.items()}
    changes: list[dict[str, Any]] = []
    tested: list[dict[str, Any]] = []
    for entrant, own in measured.items():
        if entrant is None:
            continue
        facts = {**held.place.facts, **entrant.columns, "n_items": int(there.sum()), "n_draws": len(own)}
        unchanged = np.broadcast_to(measured[None], own.shape)
        changes.append({**facts, "against": BASE, "compared": (own, unchanged, True)})
        for against in () if entrant.estimator == RANDOM else (RANDOM, PAPER):
            other = Entrant(against, OWN, entrant.rank)
            if other in measured and other != entrant:
                tested.append({**facts, "against": against, "compared": (own, measured[other], against == PAPER)})
    # changes are not tested, so that each has an interval of its own
    alone = [crossed_differences([row.pop("compared")])[0] for row in changes]
    together = crossed_differences([row.pop("compared") for row in tested])
    for row, one in zip([*changes, *tested], [*alone, *together], strict=True):
        row |= {"value": one.value, "low": one.low, "high": one.high, "p": one.p, "se": one.se}
        if row["against"] != BASE:
            row |= {"p_holm": one.p_holm, "detectable": one.detectable, "shown": one.shown}
    return changes + tested


def entrants(held: Held) -> pd.DataFrame:
    """What it took to bring every entrant to the KL.

    Returns:
        Columns `place, model, task, estimator, span, rank, n_draws, n_reached, strength, kept, kl, kl_low, kl_high,
        note`: mean strength and mean largest rank that was kept per block, and the KL on the texts that took no part in
        matching, with its range over draws.
    """
    rows = []
    for entrant in [*held.contest.entrants(), *(Entrant(RANDOM, OWN, rank) for rank in held.contest.ranks)]:
        cells = held.cells(entrant)
        reached = [cell for cell in cells if cell and cell["reached"]]
        refused = [held.refused[name] for n in range(len(cells)) if (name := entrant.cell(n)) in held.refused]
        missed = sum(1 for cell in cells if cell and not cell["reached"])
        note = "; ".join([*dict.fromkeys(refused), *([f"not reached in {missed} of {len(cells)}"] if missed else [])])
        kl = [cell["kl"] for cell in reached] or [np.nan]
        rows.append(
            {
                **held.place.facts, **entrant.columns, "n_draws": len(cells), "n_reached": len(reached),
                "strength": np.mean([cell["strength"] for cell in reached] or [np.nan]),
                "kept": np.mean([cell["rank"] for cell in reached] or [np.nan]),
                "kl": np.mean(kl), "kl_low": min(kl), "kl_high": max(kl), "note": note,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def best(held: Held, table: pd.DataFrame) -> Entrant | None:
    """The entrant with the lowest mean of the primary outcome, the paper's own apart; None where there is none.

    It is chosen by the same items that measured it, so its number flatters it. Its corrected test does not.
    """
    rows = table[table.primary & (table.against == BASE) & (table.estimator != RANDOM)]
    rows = rows[(rows.estimator != PAPER) | (rows.span != OWN)]
    if rows.empty:
        return None
    columns = dict(rows.loc[rows.value.idxmin(), ["estimator", "span", "rank"]])
    return next(one for one in held.contest.entrants() if one.columns == columns)


def everywhere(table: pd.DataFrame) -> pd.DataFrame:
    """What was shown of the primary outcome in every place, and what was shown in some.

    Returns:
        Columns `estimator, span, rank, against, shown, places, of`: the direction, in how many places it was shown, and
        in how many it was measured. Where places show opposite directions, `shown` is `"both"`.
    """
    rows = []
    of_primary = table[table.primary & (table.against != BASE)]
    for key, part in of_primary.groupby(["estimator", "span", "rank", "against"], sort=False):
        directions = set(part.shown) - {""}
        shown = "" if not directions else directions.pop() if len(directions) == 1 else "both"
        n = int((part.shown != "").sum())
        rows.append({**dict(zip(("estimator", "span", "rank", "against"), key, strict=True)), "shown": shown})
        rows[-1] |= {"places": n, "of": len(part)}
    return pd.DataFrame(rows, columns=["estimator", "span", "rank", "against", "shown", "places", "of"])
