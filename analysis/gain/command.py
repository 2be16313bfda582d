"""`spd-lens analyze gain`: where a change of the score comes from, and which factor moves it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from spd_lens.analysis.common import Findings, Quiet, html_of, page
from spd_lens.analysis.gain.beside_paper import COLUMNS, asked, beside_paper
from spd_lens.analysis.gain.completions import Opened, completions, open_all, rescored
from spd_lens.analysis.gain.factorial import cell_table, cells, effect_table, grid
from spd_lens.analysis.gain.figures import effect_figures, split_figures
from spd_lens.analysis.gain.report import conclusions, report, shown
from spd_lens.analysis.gain.split import split
from spd_lens.files import write_text
from spd_lens.output import set_up_logging


def main(
    studies: Annotated[list[Path], typer.Argument(help="Folders of finished studies of one model (`spd-lens study`).")],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; by default gain/ in the first study.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="The targets' data, if no longer where it was.")] = None,
    beside: Annotated[
        str | None, typer.Option(help="One of the paper's models, to print its table 1 beside; else the studies' own.")
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run generated programs, in the sandbox, to score them.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Where a change of the score comes from: stopping, the form of the answer, or the rest; and what moves it.

    Scores the completions that studies have kept, without a model: whole, cut behind the answer, and by rules that look
    for a stated answer. Several studies that differ in prompt format or in padding in the loss are crossed with scorer
    and projection. Writes gain.md, gain.csv, factorial.csv, effects.csv and gain.html.
    """
    set_up_logging(quiet)
    opened = open_all(studies, data_dir, allow_code_execution)
    model = asked(beside, opened)
    points = grid(opened)
    frame = completions(opened)
    table, tables = split(frame), cells(frame, points)
    crossed, effects = cell_table(tables), effect_table(tables)
    paper = pd.DataFrame(columns=COLUMNS) if model is None else beside_paper(table, model)
    found = conclusions(table, effects)
    text = report(opened, table, crossed, effects, tables, paper, found, _notes(opened, frame))
    folder = out or studies[0] / "gain"
    files = [
        write_text(folder / f"{name}.csv", rows.to_csv(index=False))
        for name, rows in (("gain", table), ("factorial", crossed), ("effects", effects))
    ]
    figures = [*split_figures(table), *effect_figures(effects)]
    title, _, rest = text.partition("\n\n")
    first, _, tabled = rest.partition("\n## ")
    html = page(title.removeprefix("# "), figures, before=html_of(first), after=html_of(f"## {tabled}"))
    files += [write_text(folder / "gain.md", text), write_text(folder / "gain.html", html)]
    Findings(shown(table), "\n".join(found), files).show()


def _notes(studies: list[Opened], frame: pd.DataFrame) -> list[str]:
    """What a reader has to know of these studies beside the numbers."""
    notes = []
    if left_out := sorted({target for one in studies for target in one.left_out}):
        notes.append(
            f"Left out, since scoring them means running programs that a model wrote: {', '.join(left_out)}; "
            "`--allow-code-execution` runs them in the sandbox."
        )
    if n := rescored(studies, frame):
        notes.append(
            f"{n} completions are scored otherwise by today's rules than when the study was run; scores here are "
            "today's."
        )
    return notes
