"""Temperature and top-p: what they do to completions and their scores, with the projection and without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import pandas as pd
import plotly.graph_objects as go
import typer
from rich.table import Table

from spd_lens.analysis.common import Findings, Subject, analysis, bars, line, panel, panels
from spd_lens.errors import SPDError
from spd_lens.evaluation import corpus_diagnostics
from spd_lens.examples import Example
from spd_lens.generation import Corpus, generate
from spd_lens.models import ModelPair
from spd_lens.output import terminal
from spd_lens.stats import Estimate, paired_difference, score_interval, within_noise
from spd_lens.subspaces import Policy
from spd_lens.tasks import Task

TEMPERATURES = (0.5, 1.0, 1.5)
TOP_PS = (0.9, 1.0)
RANDOM = "random"
"""The control's name, which is drawn grey."""
MEASURES = {
    "accuracy": "score of a sample (pass@1)",
    "length": "tokens per completion",
    "repeated 4-grams": "share of repeated 4-grams",
    "after the answer": "share of tokens behind the answer",
}
"""What the figures show, with their axes."""

Setting = tuple[str, float, float]
"""Policy, temperature, top-p."""
Scores = dict[str, list[float]]
"""The score of each sample, by prompt."""


def sampled(
    pair: ModelPair,
    items: Sequence[Example],
    policies: Sequence[Policy],
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    top_ps: Sequence[float] = TOP_PS,
    samples: int = 4,
    max_new_tokens: int = 256,
    seed: int = 42,
    batch_size: int | None = None,
    folder: Path | None = None,
    progress: bool = True,
) -> dict[Setting, Corpus]:
    """Completions of every policy at every point of the grid; greedy sampling has one sample and one top-p.

    Args:
        pair: The model.
        items: The prompts.
        policies: The base, the projected model and controls.
        temperatures: Temperatures of the grid.
        top_ps: Values of top-p of the grid.
        samples: Number of completions of each prompt.
        max_new_tokens: Token limit.
        seed: Seed of the sampling noise. It is the same everywhere: policies differ by what they do with it.
        batch_size: Number of completions at once. None: as many as memory allows.
        folder: Folder that keeps the completions, so that a sweep that was interrupted goes on.
        progress: Show progress bars.

    Raises:
        SPDError: An empty grid, or what `generate` refuses.
    """
    if not temperatures or not top_ps or not policies:
        raise SPDError("a sweep needs at least one policy, one temperature and one top-p")
    found = {}
    for policy, temperature, top_p in product(policies, temperatures, top_ps):
        greedy = temperature == 0
        if greedy and (policy.name, 0.0, 1.0) in found:
            continue
        setting = (policy.name, float(temperature), 1.0 if greedy else float(top_p))
        name = f"{policy.name}-t{setting[1]:g}-p{setting[2]:g}.jsonl"
        found[setting] = generate(
            pair, items, policy=policy, temperature=setting[1], top_p=setting[2], top_k=0, seed=seed,
            samples_per_prompt=1 if greedy else samples, max_new_tokens=max_new_tokens, batch_size=batch_size,
            path=None if folder is None else folder / name, progress=progress,
        )  # fmt: skip
    return found


def scored(corpora: Mapping[Setting, Corpus], task: Task, items: Sequence[Example]) -> dict[Setting, Scores]:
    """Scores of every completion, by prompt; there are no prompts if the task cannot score here, nor those that cannot
    be judged."""
    try:
        task.check_scorable()
    except SPDError:
        return {setting: {} for setting in corpora}
    by_id = {item.id: item for item in items}
    found: dict[Setting, Scores] = {}
    for setting, corpus in corpora.items():
        scores = found[setting] = {}
        for record in corpus:
            scores.setdefault(record.id, []).append(task.score(by_id[record.id], record.completion))
    judged = {id for id, item in by_id.items() if task.judges(item)}  # known now that they are scored
    return {setting: {id: own for id, own in scores.items() if id in judged} for setting, scores in found.items()}


def sweep_frame(
    corpora: Mapping[Setting, Corpus], scores: Mapping[Setting, Scores], task: Task, tokenizer: Any = None
) -> pd.DataFrame:
    """Diagnostics and scores of each: `policy, temperature, top_p, measure, value, low, high, n, unit`.

    `accuracy` is the mean score of a sample, with each prompt's samples averaged first (pass@1, clustered by prompt);
    `any sample` the share of prompts with a right sample among theirs. Both are left out where the task cannot score.
    """
    found = {}
    for setting, corpus in corpora.items():
        frame = found[setting] = corpus_diagnostics(corpus, tokenizer, task).drop(columns="interval")
        for measure, of_samples in (("accuracy", fmean), ("any sample", max)):
            if scores[setting]:
                estimate = score_interval(map(of_samples, scores[setting].values()))
                frame.loc[len(frame)] = {"measure": measure, **estimate.to_row(), "unit": "share"}
    front = ["policy", "temperature", "top_p"]
    return pd.concat(found, names=front).reset_index(front).reset_index(drop=True)


def sweep_differences(scores: Mapping[Setting, Scores]) -> pd.DataFrame:
    """Accuracy of each policy minus the first's at the same point, paired by prompt."""
    first = next(iter(scores))[0]
    means = {setting: {id: fmean(own) for id, own in found.items()} for setting, found in scores.items()}
    rows = []
    for (policy, temperature, top_p), mine in means.items():
        if policy != first and mine:
            base = means[first, temperature, top_p]
            found = paired_difference([base[id] for id in mine], list(mine.values()))
            where = {"policy": policy, "reference": first, "temperature": temperature, "top_p": top_p}
            rows.append({**where, **found.to_row(), "within_noise": within_noise(found)})
    columns = ["policy", "reference", "temperature", "top_p", "value", "low", "high", "n", "within_noise"]
    return pd.DataFrame(rows, columns=columns)


def sweep_figure(frame: pd.DataFrame, measure: str) -> go.Figure:
    """One measure against temperature, a panel for each top-p, a line for each policy, with 95 % intervals."""
    rows = frame[frame["measure"] == measure]
    top_ps = sorted(set(rows["top_p"]))
    fig = panels(
        [f"top-p {p:g}" for p in top_ps], f"{measure[0].upper()}{measure[1:]} by temperature and top-p", "temperature",
        MEASURES.get(measure, measure), columns=len(top_ps),
    )  # fmt: skip
    for (i, policy), (n, top_p) in product(enumerate(dict.fromkeys(rows["policy"])), enumerate(top_ps)):
        own = rows[(rows["policy"] == policy) & (rows["top_p"] == top_p)].sort_values("temperature")
        beside = own["temperature"] + 0.012 * (i - 1)  # where intervals would hide each other
        line(
            fig, beside, own["value"], policy, index=i, null=policy.startswith(RANDOM), legendgroup=policy,
            showlegend=n == 0, **panel(n),
            error_y=bars(own["value"], own["low"], own["high"]),
        )  # fmt: skip
    fig.update_xaxes(tickvals=sorted(set(rows["temperature"])))
    fig.update_yaxes(rangemode="tozero")
    fig.update_layout(height=480)
    return fig


def say(frame: pd.DataFrame, differences: pd.DataFrame) -> str:
    """Where accuracy is best, and where a policy differs from the first beyond noise."""
    sentences = []
    accuracy = frame[frame["measure"] == "accuracy"]
    for policy, rows in accuracy.groupby("policy", sort=False):
        best = rows.loc[rows["value"].idxmax()]
        found = Estimate(best["value"], best["low"], best["high"], int(best["n"]), "")
        sentences.append(
            f"{policy}: best accuracy {found} at temperature {best['temperature']:g}, top-p {best['top_p']:g}."
        )
    if sentences:
        sentences.append("The best of several settings looks better than it is.")
    for policy, rows in differences.groupby("policy", sort=False):
        clear = int((~rows["within_noise"]).sum())
        against = f"{policy} minus {rows['reference'].iloc[0]}, paired by prompt"
        sentences.append(f"{against}: beyond noise at {clear} of {len(rows)} settings (by chance, one in twenty).")
    if not len(accuracy):
        sentences.append("The task cannot be scored here, so there is no accuracy.")
    return " ".join(sentences)


@analysis()
def main(
    subject: Subject,
    *,
    temperatures: Annotated[str, typer.Option(help="Temperatures, with commas; 0 is greedy.")] = ",".join(
        map(str, TEMPERATURES)
    ),
    top_ps: Annotated[str, typer.Option(help="Values of top-p, with commas.")] = ",".join(map(str, TOP_PS)),
    n: Annotated[int, typer.Option(min=1, help="Number of test items.")] = 16,
    samples: Annotated[int, typer.Option(min=1, help="Number of completions of each item.")] = 4,
    random: Annotated[bool, typer.Option(help="Also under a random subspace of the same ranks, the control.")] = True,
    adapter: Annotated[bool, typer.Option(help="Also by the fine-tuned model.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sampling noise and of the random subspace.")] = 42,
) -> Findings:
    """Completions and scores over a grid of temperatures and top-p, under the run's projection and without."""
    grid = (_numbers(temperatures, "temperatures"), _numbers(top_ps, "top-ps"))
    config, subspace = subject.run.config, subject.subspace
    policies = [Policy("base"), Policy("projected", subspace, config.strength)]
    policies += [Policy(RANDOM, subspace.random_like(seed), config.strength)] if random else []
    policies += [Policy("tuned", adapter=subject.run.adapter)] if adapter else []
    items = subject.task.test(n, config.data_seed)
    corpora = sampled(
        subject.pair, items, policies, temperatures=grid[0], top_ps=grid[1], samples=samples, seed=seed,
        max_new_tokens=subject.task.max_new_tokens, batch_size=config.generation_batch_size,
        folder=subject.folder / "sampling_sweep" / f"n{n}-samples{samples}-seed{seed}", progress=subject.progress,
    )  # fmt: skip
    scores = scored(corpora, subject.task, items)
    frame = sweep_frame(corpora, scores, subject.task, subject.pair)
    differences = sweep_differences(scores)
    says = say(frame, differences)
    facts: dict[str, Any] = {
        "temperatures": grid[0],
        "top_ps": grid[1],
        "items": n,
        "samples": samples,
        "seed": seed,
    }
    shown = [measure for measure in MEASURES if measure in set(frame["measure"])]
    written = subject.save(
        "sampling_sweep", frame, [sweep_figure(frame, measure) for measure in shown], says=says, **facts
    )
    written += subject.save("sampling_sweep-differences", differences, says=says, **facts)
    return Findings(_table(subject.name, frame), says, written)


def _numbers(text: str, what: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise SPDError(f"{what} must be numbers with commas between, not {text!r}") from error


def _table(name: str, frame: pd.DataFrame) -> Table:
    rows = []
    for (policy, temperature, top_p), found in frame.groupby(["policy", "temperature", "top_p"], sort=False):
        own = found.set_index("measure")
        cells = [_interval(own.loc[m]) if m in own.index else "-" for m in MEASURES]
        rows.append([policy, f"{temperature:g}", f"{top_p:g}", *cells])
    return terminal(["policy", "temperature", "top-p", *MEASURES], rows, title=f"sampling sweep of {name}")


def _interval(row: pd.Series) -> str:
    if pd.isna(row["low"]):
        return f"{row['value']:.3g}"
    return Estimate(row["value"], row["low"], row["high"], 0, "").interval
