"""`make bench`: every comparison, one table, one JSON file."""

from __future__ import annotations

import datetime
import importlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import machine, subjects, table
from spd_lens.output import set_up_logging, single_command, start

STAGES = {
    **{
        name: name for name in ("extraction", "lens", "generation", "training", "sweep", "memory", "profile", "scaling")
    },
    "run": "whole_run",
    "curves": "curves",
}
"""Modules here with `rows(models, quick)`, by the name that `--only` takes."""


def main(
    only: Annotated[str, typer.Option(help=f"Some of {', '.join(STAGES)}, separated by commas.")] = ",".join(STAGES),
    models: Annotated[str, typer.Option(help="Models, separated by commas.")] = ",".join(subjects.MODELS),
    quick: Annotated[
        bool, typer.Option(help="Fewer and shorter rounds: to try the benchmarks, not to report.")
    ] = False,
    out: Annotated[Path, typer.Option(help="JSON file.")] = Path("benchmarks/results/latest.json"),
) -> None:
    """Time spd_lens beside its peers and print ratio, target and bound."""
    chosen, names = _choice(only, STAGES), _choice(models, subjects.MODELS)
    set_up_logging(quiet=True)
    console = Console(width=200 if not sys.stdout.isatty() else None)
    facts = {"date": datetime.date.today().isoformat(), "quick": quick, **machine.facts()}
    console.print(facts)
    rows: list[table.Row] = []
    for stage in chosen:
        for row in _rows(stage, names, quick):
            rows.append(row)
            console.print(
                f"{stage} | {row.model} | {row.dtype} | {row.what}: {row.value:.2f} {row.unit}", highlight=False
            )
            table.write(rows, facts, out)  # what was measured survives an interruption
    table.show(rows, console)
    console.print(f"written to {out}")


def _rows(stage: str, models: list[str], quick: bool) -> Iterator[table.Row]:
    yield from importlib.import_module(f"benchmarks.{STAGES[stage]}").rows(models, quick)


def _choice(text: str, among: Iterable[str]) -> list[str]:
    chosen = [word.strip() for word in text.split(",") if word.strip()]
    for word in chosen:
        if word not in among:
            raise typer.BadParameter(f"unknown {word!r}; choose from {', '.join(among)}")
    return chosen


app = single_command(main)

if __name__ == "__main__":
    start(app, on_interrupt="what was measured so far is in the JSON file")
