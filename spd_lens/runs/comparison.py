"""Two runs on the same items: paired differences with intervals, exact McNemar, seeds clustered by item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from spd_lens.errors import SPDError
from spd_lens.evaluation import OUTCOMES, EvalResult, ItemResult
from spd_lens.output import inert, markdown
from spd_lens.runs.run_dir import Run
from spd_lens.stats import (
    Estimate,
    McNemar,
    SeedSummary,
    clustered_difference,
    clustered_mean,
    mcnemar_exact,
    seed_summary,
    verdict,
)

FORCED = {
    "aligned loss": "aligned_loss", "completion loss": "completion_loss", "token accuracy": "token_accuracy",
    "KL from base": "kl", **{heading: outcome for outcome, heading in OUTCOMES.items()},
}  # fmt: skip
"""Teacher-forced measures, and the attribute of an item that holds each; first those that every version has."""
MEASURES: dict[str, Callable[[ItemResult], float | None]] = {
    "accuracy": lambda item: item.score if item.judged else None,
    "accuracy by likelihood": attrgetter("choice_score"),
    **{measure: attrgetter(field) for measure, field in FORCED.items()},
    "tokens": lambda item: float(item.n_tokens),
}
"""Measures that are compared. Losses and KL are nats per token of the gold completion; tokens are the own length."""


@dataclass(frozen=True)
class Comparison:
    """One measure of one policy on one task, in two runs or two groups of runs that differ in their seed."""

    task: str
    policy: str
    measure: str
    first: Estimate
    second: Estimate
    difference: Estimate
    """`second - first`, paired by item."""
    test: McNemar | None
    """Exact McNemar, for 0/1 scores of single runs."""
    seeds: tuple[SeedSummary, SeedSummary] | None
    """Mean, sd and interval over seeds of each side, where both have several."""

    @property
    def verdict(self) -> str:
        """`stats.verdict` of the difference: `higher`, `lower`, `within noise` or `too few items`."""
        return verdict(self.difference, None if self.test is None else self.test.p_value)


def compare(first: Sequence[Run], second: Sequence[Run]) -> list[Comparison]:
    """Every measure of every policy and task that all runs have, on the same test items.

    Several runs on a side are the same settings with other seeds; the items must be the same (`data_seed`).

    Raises:
        SPDError: no task or policy in common, or other items.
    """
    sides = [_results(runs) for runs in (first, second)]
    shared = [key for key in sides[0] if key in sides[1]]
    if not shared:
        raise SPDError(
            f"{first[0].path} and {second[0].path} have no task and policy in common; "
            "compare runs that were evaluated on the same tasks"
        )
    found = []
    for task, policy in shared:
        a, b = sides[0][task, policy], sides[1][task, policy]
        ids = _items(a + b, task)
        for measure, value in MEASURES.items():
            before, after = _values(a, b, ids, value)
            if before[0]:
                found.append(_comparison(task, policy, measure, before, after))
    return found


def comparison_table(comparisons: Sequence[Comparison], first: str, second: str) -> str:
    """The comparisons as Markdown; `first` and `second` name the sides."""
    lines = [
        f"# {inert(second)} against {inert(first)}",
        "",
        "Differences are paired by item, with 95 % intervals; p is McNemar's exact test on 0/1 scores.",
        "",
        *markdown(
            ["task", "policy", "measure", inert(first), inert(second), "difference", "p", "verdict"],
            (
                [inert(c.task), inert(c.policy), c.measure, c.first, c.second, c.difference,
                 f"{c.test.p_value:.2g}" if c.test else "-", c.verdict]
                for c in comparisons
            ),
        ),
    ]  # fmt: skip
    seeded = [c for c in comparisons if c.seeds]
    if seeded:
        lines += ["", "Over seeds:", ""]
        for c in seeded:
            lines += [f"- {inert(f'{c.task}, {c.policy}, {c.measure}: {first} {c.seeds[0]}; {second} {c.seeds[1]}')}"]  # type: ignore[index]  # filtered above
    return "\n".join(lines) + "\n"


def _results(runs: Sequence[Run]) -> dict[tuple[str, str], list[EvalResult]]:
    """One result per run for every task and policy that all of the runs have."""
    per_run = []
    for run in runs:
        files = sorted((run.path / "eval").glob("*/*.json"))
        per_run.append({(file.parent.name, file.stem): file for file in files if ".settings" not in file.suffixes})
    keys = [key for key in per_run[0] if all(key in files for files in per_run)]
    return {key: [EvalResult.load(files[key]) for files in per_run] for key in keys}


def _items(results: Sequence[EvalResult], task: str) -> list[str]:
    """The items that all results have, or a refusal where they have others."""
    ids = {tuple(sorted(item.id for item in result.items)) for result in results}
    if len(ids) > 1:
        raise SPDError(
            f"the runs were evaluated on different items of {task}, so nothing is paired; "
            "evaluate them with the same n_eval and data_seed"
        )
    return [item.id for item in results[0].items]


def _values(
    a: Sequence[EvalResult], b: Sequence[EvalResult], ids: Sequence[str], value: Callable[[ItemResult], float | None]
) -> list[list[list[float]]]:
    """For each side `scores[seed][item]` of one measure: items that have it in all results, in the order of `ids`."""
    sides = [[{item.id: value(item) for item in result.items} for result in side] for side in (a, b)]
    shared = [id for id in ids if all(row[id] is not None for side in sides for row in side)]
    return [[[row[id] for id in shared] for row in side] for side in sides]  # type: ignore[misc]  # none of them is None


def _comparison(task: str, policy: str, measure: str, a: list[list[float]], b: list[list[float]]) -> Comparison:
    test, seeds = None, None
    binary = all(value in (0.0, 1.0) for row in a + b for value in row)
    if measure.startswith("accuracy") and len(a) == len(b) == 1 and binary:
        test = mcnemar_exact(a[0], b[0])
    if len(a) > 1 and len(b) > 1:
        before, after = (seed_summary(sum(row) / len(row) for row in side) for side in (a, b))
        seeds = before, after
    return Comparison(
        task, policy, measure, clustered_mean(a), clustered_mean(b), clustered_difference(a, b), test, seeds
    )
