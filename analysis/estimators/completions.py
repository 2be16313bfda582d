"""What the model says: greedy answers of the base model, and under the paper's, a random and the best subspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from spd_lens.analysis.estimators.engine import Held
from spd_lens.analysis.estimators.settings import OWN, PAPER, RANDOM, Entrant
from spd_lens.analysis.estimators.tables import BASE, best
from spd_lens.errors import SPDError
from spd_lens.evaluation import Policy
from spd_lens.generation import Corpus, generate
from spd_lens.stats import paired_difference, score_interval

Answers = Mapping[str, Corpus]
"""Completions of the same items, by who wrote them; the base model's first."""


def answers(held: Held, table: pd.DataFrame) -> Answers:
    """Greedy completions of the first items, each policy by the first draw of calibration examples that reaches the KL.

    The paper's and the random subspace are at the contest's first rank, the best at its own.
    """
    if not held.contest.n_completions:
        return {}
    policies = {BASE: Policy(BASE)}
    chosen = [(name, Entrant(name, OWN, held.contest.ranks[0])) for name in (PAPER, RANDOM)]
    if (first := best(held, table)) is not None:
        chosen.append((f"best: {first.estimator}, {first.span} span, rank {first.rank}", first))
    for name, entrant in chosen:
        reached = [draw for draw, cell in enumerate(held.cells(entrant)) if cell and cell["reached"]]
        if reached:
            policies[name] = held.policy(entrant, reached[0])
    items, found = held.items[: held.contest.n_completions], {}
    for name, policy in policies.items():
        stem = BASE if policy.subspace is None else f"{policy.subspace.digest()}-{policy.strength:.6f}"
        found[name] = generate(
            held.pair, items, policy=policy, max_new_tokens=held.task.max_new_tokens, temperature=0.0,
            batch_size=held.config.generation_batch_size,
            path=held.place.folder / "completions" / f"{stem}-{len(items)}.jsonl",
            progress=held.place.experiment.progress,
        )  # fmt: skip
    return found


def accuracy(held: Held, found: Answers) -> pd.DataFrame:
    """How many of the answers are right; no rows where nothing may score them.

    Returns:
        Columns `place, policy, accuracy, change, truncated, n`: accuracy with its interval, and its difference to the
        base model's, paired by item, in words; the share of answers that were cut at the task's limit of tokens.
    """
    try:
        held.task.check_scorable()
    except SPDError:
        return pd.DataFrame()
    rows, base = [], None
    for name, corpus in found.items():
        scores = [held.task.score(item, one.completion) for item, one in zip(held.items, corpus, strict=False)]
        base = scores if base is None else base
        rows.append(
            {
                "place": held.place.name,
                "policy": name,
                "accuracy": score_interval(scores).interval,
                "change": "" if name == BASE else paired_difference(base, scores).interval,
                "truncated": sum(one.finish_reason == "length" for one in corpus) / len(scores),
                "n": len(scores),
            }
        )
    return pd.DataFrame(rows)


def cards(held: Held, found: Answers) -> Sequence[dict[str, Any]]:
    """The answers item by item, side by side, for the page."""
    n = min(map(len, found.values()), default=0)
    return [
        {
            "id": f"{held.place.name}: {item.id}",
            "prompt": item.prompt,
            "sections": [("gold", item.completion), *((name, own[i].completion) for name, own in found.items())],
        }
        for i, item in enumerate(held.items[:n])
    ]
