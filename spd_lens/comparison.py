"""Two runs on the same items: paired differences with intervals, exact McNemar, seeds clustered by item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spd_lens.errors import SPDError
from spd_lens.estimate import Estimate
from spd_lens.evaluation import EvalResult, ItemResult
from spd_lens.rundir import Run
from spd_lens.statistics import (
    McNemar,
    SeedSummary,
    clustered_difference,
    clustered_mean,
    mcnemar_exact,
    seed_summary,
    verdict,
)
from spd_lens.tables import markdown

MEASURES: dict[str, Callable[[ItemResult], float | None]] = {
    "accuracy": lambda item: item.score,
    "accuracy by likelihood": lambda item: item.choice_score,
    "aligned loss": lambda item: item.aligned_loss,
    "completion loss": lambda item: item.completion_loss,
    "token accuracy": lambda item: item.token_accuracy,
    "KL from base": lambda item: item.kl,
    "tokens": lambda item: float(item.n_tokens),
}
"""What is compared. Losses and KL are nats per token of the gold completion, tokens the length of the own one."""


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
        """`statistics.verdict` on the difference: `higher`, `lower`, `within noise` or `too few items`."""
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
        _check_items(a + b, task)
        for measure, value in MEASURES.items():
            before, after = _values(a, value), _values(b, value)
            if before is not None and after is not None:
                found.append(_comparison(task, policy, measure, before, after))
    return found


def comparison_table(comparisons: Sequence[Comparison], first: str, second: str) -> str:
    """Markdown."""
    lines = [
        f"# {second} against {first}",
        "",
        "Differences are paired by item, with 95 % intervals; p is McNemar's exact test on 0/1 scores.",
        "",
        *markdown(
            ["task", "policy", "measure", first, second, "difference", "p", "verdict"],
            (
                [c.task, c.policy, c.measure, c.first, c.second, c.difference,
                 f"{c.test.p_value:.2g}" if c.test else "-", c.verdict]
                for c in comparisons
            ),
        ),
    ]  # fmt: skip
    seeded = [c for c in comparisons if c.seeds]
    if seeded:
        lines += ["", "Over seeds:", ""]
        for c in seeded:
            lines += [f"- {c.task}, {c.policy}, {c.measure}: {first} {c.seeds[0]}; {second} {c.seeds[1]}"]  # type: ignore[index]  # filtered above
    return "\n".join(lines) + "\n"


def _results(runs: Sequence[Run]) -> dict[tuple[str, str], list[EvalResult]]:
    """For every task and policy that all of the runs have, one result per run."""
    per_run = []
    for run in runs:
        files = sorted((run.path / "eval").glob("*/*.json"))
        per_run.append({(file.parent.name, file.stem): file for file in files if ".settings" not in file.suffixes})
    keys = [key for key in per_run[0] if all(key in files for files in per_run)]
    return {key: [EvalResult.load(files[key]) for files in per_run] for key in keys}


def _check_items(results: Sequence[EvalResult], task: str) -> None:
    ids = {tuple(sorted(item.id for item in result.items)) for result in results}
    if len(ids) > 1:
        raise SPDError(
            f"the runs were evaluated on different items of {task}, so nothing is paired; "
            "evaluate them with the same n_eval and data_seed"
        )


def _values(
    results: Sequence[EvalResult], value: Callable[[ItemResult], float | None]
) -> list[dict[str, float]] | None:
    """`scores[seed][item]` of one measure, or None if some item lacks it."""
    table = [{item.id: value(item) for item in result.items} for result in results]
    if any(found is None for row in table for found in row.values()):
        return None
    return [{key: float(found or 0.0) for key, found in row.items()} for row in table]


def _comparison(
    task: str, policy: str, measure: str, a: list[dict[str, float]], b: list[dict[str, float]]
) -> Comparison:
    ids = list(a[0])
    single = len(a) == len(b) == 1
    binary = all(value in (0.0, 1.0) for row in a + b for value in row.values())
    test = None
    if measure.startswith("accuracy") and single and binary:
        test = mcnemar_exact([a[0][i] for i in ids], [b[0][i] for i in ids])
    seeds = None
    if len(a) > 1 and len(b) > 1:
        means = [[sum(row.values()) / len(row) for row in side] for side in (a, b)]
        seeds = (seed_summary(means[0]), seed_summary(means[1]))
    # rows of numbers in one order of items: the same items in all runs was checked
    x, y = ([[row[i] for i in ids] for row in side] for side in (a, b))
    return Comparison(
        task, policy, measure, clustered_mean(x), clustered_mean(y), clustered_difference(x, y), test, seeds
    )
