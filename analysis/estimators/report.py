"""What was found, in sentences and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from rich.table import Table

from spd_lens.analysis.estimators.settings import PAPER, RANDOM, Contest
from spd_lens.analysis.estimators.tables import BASE
from spd_lens.evaluation import KL_TOLERANCE, OUTCOMES, SAYS
from spd_lens.output import inert, markdown, terminal, visible
from spd_lens.stats import bracketed

HOW = (
    "Every subspace is applied at the strength, or where full strength is too little at the rank, at which the mean KL "
    "from the base model on one half of {n} other texts is {kl:g} nats per token, within {tolerance:.0%}. Then it is "
    "measured teacher-forced on the same held-out items. Losses and differences are in nats per token. Intervals are "
    "95 %, over items and draws both (crossed random effects, the sum of the two one-way variances: Owen 2007), and "
    "each for itself; p-values are corrected over all differences of one outcome (Holm). Random subspaces have the "
    "ranks of the paper's, and the null is that an estimator's subspace is one more of them. *Detectable* is the "
    "smallest difference that would have been shown with probability 0.8 at this noise after correction; what is ruled "
    "out is what lies beyond the interval. The best entrant is chosen by the items that measure it."
)
LOSSES = ("results_loss", "copies_loss", "answer_only_loss", "rest_loss", "aligned_loss")
"""The outcomes that stand side by side."""


def says(table: pd.DataFrame) -> list[str]:
    """The sentences: what of the primary outcome was shown in each place."""
    found = []
    for place, part in table[table.primary].groupby("place", sort=False):
        heading = OUTCOMES[part.outcome.iloc[0]]
        tested = part[part.against != BASE]
        shown = tested[tested.shown != ""]
        for row in shown.itertuples():
            found.append(f"{place}: {heading} of {_name(row)} is {row.shown} than {row.against}'s, {_difference(row)}.")
        if not len(tested):
            found.append(f"{place}: nothing could be compared; see what did not reach the KL.")
        elif shown.empty:
            found.append(
                f"{place}: no difference in {heading} to random subspaces or the paper's is shown; one of "
                f"{tested.detectable.median():.3f} nats per token would have been, four times in five (median)."
            )
    return found


def report(
    contest: Contest,
    table: pd.DataFrame,
    reached: pd.DataFrame,
    right: pd.DataFrame,
    shown_everywhere: pd.DataFrame,
    predictions: Sequence[Mapping[str, Any]],
    provenance: Sequence[str],
) -> str:
    """The whole report in Markdown."""
    lines = ["# Contest of estimators", "", *(f"- {sentence}" for sentence in says(table)), ""]
    lines += [HOW.format(n=contest.n_texts, kl=contest.kl, tolerance=KL_TOLERANCE), ""]
    lines += [line for sentence in provenance for line in (sentence, "")]
    if predictions:
        rows = [[one["claim"], one["place"], one["outcome"], one["of"]] for one in predictions]
        lines += ["## What was predicted", "", *_table(["claim", "place", "outcome", "differences"], rows), ""]
    if reached.place.nunique() > 1:
        held = [
            [_name(row), f"minus {row.against}", row.shown or "not shown", f"{row.places} of {row.of}"]
            for row in shown_everywhere.itertuples()
        ]
        lines += ["## Across places", "", *_table(["entrant", "difference", "shown", "in places"], held), ""]
    for place, part in table.groupby("place", sort=False):
        first = part.iloc[0]
        heading = f"## {inert(place)}: {inert(first.model)}, {inert(first.task)}"
        lines += [heading, "", *_decided(part), "", *_side_by_side(part), ""]
        lines += [*_reached(reached[reached.place == place]), "", *_right(right, place)]
    lines += ["## The outcomes", "", *(f"- **{OUTCOMES[name]}**: {SAYS[name]}" for name in OUTCOMES)]
    return visible("\n".join(lines) + "\n")


def shown(part: pd.DataFrame, place: str) -> Table:
    """The primary outcome of one place for the terminal."""
    head, rows = _primary_rows(part[part.place == place])
    return terminal(head, rows, title=f"{place}: what is decided, nats per token")


def _decided(part: pd.DataFrame) -> list[str]:
    head, rows = _primary_rows(part)
    return _table(head, rows)


def _primary_rows(part: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Change from base, and the differences to random and to the paper's, of the outcome that decides."""
    own = part[part.primary]
    heading = OUTCOMES[own.outcome.iloc[0]]
    rows = []
    for _, each in own.groupby(["estimator", "span", "rank"], sort=False):
        by_other = {row.against: row for row in each.itertuples()}
        cells = [_name(by_other[BASE]), _interval(by_other[BASE])]
        for against in (RANDOM, PAPER):
            row = by_other.get(against)
            cells += ["", "", ""] if row is None else [_interval(row), f"{row.p_holm:.2g}", f"{row.detectable:.3f}"]
        rows.append(cells)
    compared = [name for against in ("random", "paper") for name in (f"minus {against}", "corrected p", "detectable")]
    return ["entrant", f"{heading}, change from base", *compared], rows


def _side_by_side(part: pd.DataFrame) -> list[str]:
    """The change of every outcome from the base model."""
    there = [name for name in (*LOSSES, "completion_loss", "kl", "token_accuracy") if name in set(part.outcome)]
    rows = []
    for _, each in part[part.against == BASE].groupby(["estimator", "span", "rank"], sort=False):
        by_outcome = {row.outcome: row for row in each.itertuples()}
        rows.append([_name(next(iter(by_outcome.values()))), *(_interval(by_outcome[name]) for name in there)])
    return _table(["change from base", *(OUTCOMES[name] for name in there)], rows)


def _reached(part: pd.DataFrame) -> list[str]:
    rows = [
        [
            _name(row), f"{row.n_reached} of {row.n_draws}",
            *(["", "", ""] if not row.n_reached else [f"{row.strength:.2f}", f"{row.kept:g}",
              f"{row.kl:.3f} ({row.kl_low:.3f} to {row.kl_high:.3f})"]),
            row.note,
        ]
        for row in part.itertuples()
    ]  # fmt: skip
    head = ["entrant", "draws that reach the KL", "strength", "largest rank", "KL on the other half (range)", "note"]
    return _table(head, rows)


def _right(right: pd.DataFrame, place: str) -> list[str]:
    """The greedy answers of a place, if there are any that could be scored."""
    if right.empty:
        return []
    own = right[right.place == place]
    rows = [
        [one.policy, one.accuracy, one.change, one.minus_random, f"{one.truncated:.0%}", f"{one.n} x {one.draws}"]
        for one in own.itertuples()
    ]
    head = ["greedy answers", "accuracy", "change from base", "minus random", "cut at the limit", "items x draws"]
    return [*_table(head, rows), ""] if rows else []


def _name(row: Any) -> str:
    span = "" if row.estimator == RANDOM else f", {row.span} span"
    return f"{row.estimator}{span}, rank {row.rank}"


def _interval(row: Any) -> str:
    return bracketed(row.value, row.low, row.high, sign="+")


def _difference(row: Any) -> str:
    return f"{_interval(row)}, corrected p = {row.p_holm:.2g}"


def _table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """A table whose cells cannot break out of it or become markup."""
    return markdown(head, ([inert(cell) for cell in row] for row in rows))
