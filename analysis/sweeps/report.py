"""What both sweep commands do with a run: sweep, recommend, generate under the chosen cells, save and say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.table import Table
from rich.text import Text

from spd_lens.analysis.common import Subject, analysis, deciding, in_words
from spd_lens.analysis.sweeps.confirm import CHOSEN_MEASURES, measure_chosen
from spd_lens.analysis.sweeps.engine import sweep
from spd_lens.analysis.sweeps.figures import figures
from spd_lens.analysis.sweeps.grid import Grid, GridCell
from spd_lens.analysis.sweeps.recommend import KL_BUDGET, Recommendation, overall, recommend
from spd_lens.analysis.sweeps.store import MEASURES
from spd_lens.errors import SPDError
from spd_lens.evaluation import fitting, other_texts
from spd_lens.examples import Example
from spd_lens.output import Console, terminal
from spd_lens.runs import SPDConfig
from spd_lens.stats import bracketed
from spd_lens.subspaces import GradientMoments
from spd_lens.tasks import Task


def command(name: str, question: str, defaults: Callable[[SPDConfig], dict[str, Any]]) -> Callable[..., None]:
    """A command that sweeps a grid over `defaults`, which follow from the run's settings."""

    def work(
        subject: Subject,
        *,
        grid: Annotated[Path | None, typer.Option(help="YAML file with the grid; see docs/ablation.md.")] = None,
        items: Annotated[int | None, typer.Option(help="Held-out items, instead of the grid's.")] = None,
        random: Annotated[
            int | None, typer.Option(help="Random subspaces beside each cell, instead of the grid's.")
        ] = None,
        kl_budget: Annotated[
            float, typer.Option(help="Largest KL of a recommended cell, in nats per token.")
        ] = KL_BUDGET,
        generate: Annotated[bool, typer.Option(help="Also generate under the chosen cells.")] = True,
        answer_only: Annotated[
            bool, typer.Option("--answer-only", help="Also the loss of answers asked for without reasoning.")
        ] = False,
        other_text: Annotated[
            bool, typer.Option("--other-text", help="Also KL from base on prose that has nothing to do with the task.")
        ] = False,
        estimator: Annotated[
            str, typer.Option(help="Estimator of the subspaces, in a sweep of its own; the run's if empty.")
        ] = "",
    ) -> None:
        chosen = Grid.read(grid, defaults(subject.run.config), n_items=items, n_random=random)
        report(
            name, subject, chosen, kl_budget=kl_budget, generate=generate, answer_only=answer_only,
            other_text=other_text, estimator=estimator or None,
        )  # fmt: skip

    work.__doc__ = question
    return analysis()(work)


def report(
    name: str,
    subject: Subject,
    grid: Grid,
    *,
    kl_budget: float = KL_BUDGET,
    generate: bool = True,
    answer_only: bool = False,
    other_text: bool = False,
    estimator: str | None = None,
) -> Recommendation:
    """Run one sweep of one run and keep it in `analysis/`: `NAME.csv`, `.json`, `.html`, and `NAME-chosen.csv`.

    With another estimator than the run's own these are called `NAME-ESTIMATOR`.
    """
    config = subject.run.config
    estimated = subject.estimated(estimator, layers="all")
    if estimated.name != config.estimator:
        name += f"-{estimated.name}"
    moments = estimated.moments
    grid.cells(moments)  # an impossible grid is refused before the model is loaded
    items = subject.held_out(grid.n_items, grid.task)
    also: dict[str, Any] = {
        "answer_only": _asked(subject, grid, items) if answer_only else None,
        "texts": fitting(subject.pair, other_texts()) if other_text else (),
    }
    found = sweep(
        subject.pair, moments, items, grid, folder=subject.folder / name, strength=config.strength,
        center=config.center, center_gradients=config.center_gradients, estimated=estimated,
        progress=subject.progress, **also,
    )  # fmt: skip
    table = found.table()
    measures = found.measures
    by = deciding(measures)
    cells = {measured.cell.name: measured.cell for measured in found.cells}
    default = default_cell(subject, moments)
    advice = recommend(table, kl_budget=kl_budget, default=default.name if default else None)
    counts = [overall(table, measure, found.placebo(measure)) for measure in (by, "kl")]
    says = " ".join([advice.reason, *counts, in_words(measures)])
    facts: dict[str, Any] = {
        "grid": grid.model_dump(mode="json"), "items": len(items), "kl_budget": kl_budget, "unit": "nats per token",
        "recommended": advice.cell, "reason": advice.reason, "counts": counts, "strength": config.strength,
        "extraction": f"{int(moments.n_examples.sum())} examples",
    }  # fmt: skip
    if not estimated.is_paper:
        facts["estimator"] = estimated.name
        says += f" The subspaces are those of the estimator {estimated.name!r}."
    subject.save(name, table, figures(table, recommended=advice.cell), says=says, **facts)
    _print(name, subject, table, says)
    if generate:
        chosen = {c.name: c for c in (cells.get(advice.cell or ""), default) if c is not None}
        dear = measure_chosen(subject, estimated, grid, list(chosen.values()), **also)
        subject.save(f"{name}-chosen", dear, says="", **facts)
        _print_chosen(dear)
    return advice


def _asked(subject: Subject, grid: Grid, items: Sequence[Example]) -> Task:
    """The task of the items, which has a form without reasoning."""
    task = subject.task if grid.task is None else subject.targets[grid.task]
    if not any(task.answer_only(item) for item in items):
        raise SPDError(f"task {task.name} has no form without reasoning; leave out --answer-only")
    return task


def default_cell(subject: Subject, moments: GradientMoments) -> GridCell | None:
    """The run's own setting as a cell, or None if it keeps everything."""
    config = subject.run.config
    own = {
        "layers": [config.layers],
        "kinds": ["+".join(config.kinds)],
        "ranks": [subject.rank("")],
        "projectors": ["per_head" if config.per_head else "joint"],
    }
    try:
        return Grid.make(own).cells(moments)[0]
    except SPDError:
        return None


def _print(name: str, subject: Subject, table: pd.DataFrame, says: str) -> None:
    by = deciding(set(table["measure"]))
    loss = table[table["measure"] == by].set_index("cell")
    kl = table[table["measure"] == "kl"].set_index("cell")
    names = ["layers", "kind", "head", "projector", "rank"]
    head = [*names, f"Δ {MEASURES[by]}", "random", "minus random", "p (Holm)", "KL", "KL random"]
    rows = [
        [*map(str, row[names]), *_intervals(row), f"{row['p_holm']:.2g}",
         f"{kl.loc[cell, 'value']:.3f}", f"{kl.loc[cell, 'random']:.3f}"]
        for cell, row in loss.iterrows()
    ]  # fmt: skip
    console = Console()
    console.print(terminal(head, rows, title=f"{name.replace('_', ' ')} of {subject.name}, nats per token"))
    console.print(_outcomes(table))
    console.print(Text(says))


def _outcomes(table: pd.DataFrame) -> Table:
    """Every outcome of every cell side by side: the change from the base model, and of random subspaces."""
    fields = [field for field in MEASURES if field in set(table["measure"])]
    by_place = table.set_index(["cell", "measure"])
    rows = [
        [str(cell), *("{value:+.3f} / {random:+.3f}".format(**by_place.loc[(cell, field)]) for field in fields)]
        for cell in dict.fromkeys(table["cell"])
    ]
    head = ["cell", *(MEASURES[field] for field in fields)]
    return terminal(head, rows, title="outcomes side by side, change from base / of random subspaces, nats per token")


def _print_chosen(dear: pd.DataFrame) -> None:
    head = ["measure", "cell", "value", "random (range of draws)", "minus random"]
    rows = [[CHOSEN_MEASURES[row["measure"]], str(row["cell"]), *_intervals(row)] for _, row in dear.iterrows()]
    Console().print(terminal(head, rows, title="the chosen cells"))


def _intervals(row: pd.Series) -> Iterator[str]:
    """The cell, random subspaces and their difference; square brackets look like markup to rich, but these are none."""
    for name, ends in (("value", ""), ("random", "random_"), ("difference", "difference_")):
        yield "-" if pd.isna(row[name]) else bracketed(row[name], row[f"{ends}low"], row[f"{ends}high"])
