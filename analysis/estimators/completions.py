"""What the model says: greedy answers of the base model, and under the paper's, a random and the best subspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from spd_lens.analysis.estimators.engine import Held
from spd_lens.analysis.estimators.settings import OWN, PAPER, RANDOM, Entrant
from spd_lens.analysis.estimators.tables import BASE, Values, best
from spd_lens.errors import SPDError
from spd_lens.evaluation import Policy
from spd_lens.generation import Corpus, generate
from spd_lens.stats import bracketed, paired_difference, score_interval

Answers = Mapping[Entrant | None, Sequence[Corpus]]
"""Completions of the same items, a corpus for each draw, by who wrote them; None is the base model, which is first."""


def answers(held: Held, table: pd.DataFrame) -> Answers:
    """Greedy completions of the first items, under the first draws that reach the KL, as many as the contest asks for.

    The paper's and the random subspaces are at the contest's first rank, the best at its own.
    """
    n = held.contest.n_completions
    if not n:
        return {}
    found: dict[Entrant | None, Sequence[Corpus]] = {None: [_written(held, Policy(BASE))]}
    chosen = [Entrant(name, OWN, held.contest.ranks[0]) for name in (PAPER, RANDOM)]
    for entrant in filter(None, [*chosen, best(held, table)]):
        reached = [draw for draw, cell in enumerate(held.cells(entrant)) if cell and cell["reached"]]
        if reached:
            of_draws = reached[: held.contest.completion_draws]
            found[entrant] = [_written(held, held.policy(entrant, draw)) for draw in of_draws]
    return found


def _written(held: Held, policy: Policy) -> Corpus:
    items = held.items[: held.contest.n_completions]
    stem = BASE if policy.subspace is None else f"{policy.subspace.digest()}-{policy.strength:.6f}"
    return generate(
        held.pair, items, policy=policy, max_new_tokens=held.task.max_new_tokens, temperature=0.0,
        batch_size=held.config.generation_batch_size,
        path=held.place.folder / "completions" / f"{stem}-{len(items)}.jsonl",
        progress=held.place.experiment.progress,
    )  # fmt: skip


def scores(held: Held, found: Answers) -> Values:
    """Whether each answer is right, 1 or 0, by draw and item; empty where nothing may score them. Items that cannot be
    judged are left out, unless there are no others."""
    try:
        held.task.check_scorable()
    except SPDError:
        return {}
    items, score = held.items[: held.contest.n_completions], held.task.score
    right = {
        entrant: np.array(
            [[score(item, one.completion) for item, one in zip(items, corpus, strict=True)] for corpus in corpora],
            dtype=float,
        )
        for entrant, corpora in found.items()
    }
    judged = np.array([held.task.judges(item) for item in items])  # known now that they are scored
    return {entrant: own[:, judged] for entrant, own in right.items()} if judged.any() else right


def accuracy(held: Held, found: Answers, right: Values, differences: pd.DataFrame) -> pd.DataFrame:
    """How many of the answers are right; no rows where they were not scored.

    Args:
        held: The contest.
        found: The answers.
        right: Their `scores`.
        differences: Their `accuracy_differences`: the intervals over items and draws, where there are several draws.

    Returns:
        Columns `place, policy, accuracy, change, minus_random, truncated, n, draws`: accuracy and its differences to
        the base model's and to that under random subspaces in words, with intervals; the share of answers that were
        cut at the task's limit of tokens; items and draws. With one draw, intervals are over items alone, and a
        single random subspace says too little of the others to be compared with.
    """
    rows = []
    for entrant, own in right.items():
        by_other = {} if entrant is None else {row.against: row for row in _of(entrant, differences).itertuples()}
        change, minus_random = (_interval(by_other[name]) if name in by_other else "" for name in (BASE, RANDOM))
        if entrant is not None and not change:
            change = paired_difference(right[None][0], own[0]).interval
        rows.append(
            {
                "place": held.place.name,
                "policy": _name(entrant),
                "accuracy": score_interval(own[0]).interval if len(own) == 1 else f"{own.mean():.2f}",
                "change": change,
                "minus_random": minus_random and f"{minus_random}, p = {by_other[RANDOM].p_holm:.2g}",
                "truncated": fmean(one.finish_reason == "length" for corpus in found[entrant] for one in corpus),
                "n": own.shape[1],
                "draws": len(own),
            }
        )
    return pd.DataFrame(rows)


def cards(held: Held, found: Answers) -> Sequence[dict[str, Any]]:
    """The answers of everyone's first draw item by item, side by side, for the page."""
    first = {_name(entrant): corpora[0] for entrant, corpora in found.items()}
    n = min(map(len, first.values()), default=0)
    return [
        {
            "id": f"{held.place.name}: {item.id}",
            "prompt": item.prompt,
            "sections": [("gold", item.completion), *((name, own[i].completion) for name, own in first.items())],
        }
        for i, item in enumerate(held.items[:n])
    ]


def _name(entrant: Entrant | None) -> str:
    if entrant is None:
        return BASE
    if entrant.span == OWN and entrant.estimator in (PAPER, RANDOM):
        return entrant.estimator
    return f"best: {entrant.estimator}, {entrant.span} span, rank {entrant.rank}"


def _of(entrant: Entrant, differences: pd.DataFrame) -> pd.DataFrame:
    same = [differences[name] == value for name, value in entrant.columns.items()]
    return differences[np.logical_and.reduce(same)]


def _interval(row: Any) -> str:
    return bracketed(row.value, row.low, row.high, places=2, sign="+")
