"""The paper's tables 1-5 and figure 4 from studies: the printed number beside ours, with intervals.

| what | needs | presets |
| --- | --- | --- |
| table 1 | a study per backbone: sources gsm8k, mbpp, mmlu; methods base, psr, ssd, spd; all six targets | `paper-*` |
| table 2 | source mmlu; methods base, ssd, spd; all six targets | `paper-qwen2.5-0.5b` |
| table 3 | as table 1, with `score_projected: true` | `paper-qwen2.5-0.5b` |
| table 4 | as table 1 | `paper-qwen2.5-0.5b` |
| table 5 | as table 1, with method spd-full-loss | `paper-qwen2.5-0.5b` |
| figure 4 | a study for each calibration size (`settings: {n_calibration: ...}`, 20 to 500) | |

What a study does not have is "not run". A study may be unfinished, and may have other tasks beside the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.table import Table
from rich.text import Text

from spd_lens.analysis.common import (
    ABLATED,
    LABELS,
    LOSSES,
    SOURCE_OF,
    STAND_FOR,
    TABLES,
    PaperTable,
    Quiet,
    Row,
    page,
)
from spd_lens.analysis.paper.figure_4 import figure_4, mean_score, points, points_sentence
from spd_lens.errors import SPDError
from spd_lens.files import write_text
from spd_lens.output import Console, markdown, set_up_logging, terminal, visible
from spd_lens.runs import SPDConfig
from spd_lens.stats import bracketed
from spd_lens.study import Evidence, Outcome, backbone, base_and_published, base_warnings, differences_from_paper

NOT_RUN = "not run"
_TABLE_3 = (
    "Before training: base is the model itself, SPD the model under its projection, both greedy. The paper does not "
    "say how it scored the data of SSD, which is nothing but another way of sampling; it is not run here."
)


def fill(number: int, studies: Sequence[Evidence]) -> pd.DataFrame:
    """One of the paper's tables in long form: a row for each cell, in the order of the paper.

    Tables of one backbone (2-5) have a block for every model of the studies; table 1 has the paper's backbones, and
    then what other models the studies have. Several studies of one model complete each other, the first one first.

    Args:
        number: Number of the table, 1 to 5.
        studies: The studies, finished or not.

    Returns:
        Columns `table, backbone, method, dataset, paper, ours, low, high, n, seeds, study`. Accuracies are percent;
        `paper` is missing where the paper has no such model, `ours` where no study has the cell.

    Raises:
        SPDError: Another number.
    """
    if number not in TABLES:
        raise SPDError(f"the paper has tables 1 to 5 with results, not {number}")
    table = TABLES[number]
    rows = []
    for model, printed in _blocks(table, studies):
        own = [study for study in studies if model_of(study) == model]
        for row in printed:
            for place, dataset in enumerate(table.columns):
                found, study = _cell(own, row, dataset, table.source or SOURCE_OF[dataset])
                paper = row.values[place] if number > 1 or model == row.backbone else None
                rows.append(
                    {
                        "table": number, "backbone": model, "method": row.label, "dataset": LABELS[dataset],
                        "paper": paper, **found, "study": study,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def model_of(study: Evidence) -> str:
    """The paper's name of a study's model, or the study's own name of another one."""
    model = str((study.plan.get("settings") or {}).get("model") or SPDConfig.model_fields["model"].default)
    return backbone(model) or model.rstrip("/").rpartition("/")[2]


def to_markdown(cells: pd.DataFrame, studies: Sequence[Evidence]) -> str:
    """A filled table as Markdown, with what differs from the paper's set-up under it."""
    number = int(cells.table.iloc[0])
    table = TABLES[number]
    # tables 2 to 5 stand beside the same numbers of the paper whatever model a study is of
    whose = f"The paper's numbers are of {ABLATED}, ours of the model that the row names. " if number > 1 else ""
    sources = "Source task of each column: its domain's (MBPP, GSM8K, MMLU)."
    if table.source:
        sources = f"Source task of all columns: {LABELS[table.source]}."
    lines = [
        f"# Table {number}: {table.title}",
        "",
        "Each cell: the paper's printed number, then ours with its 95 % interval over items (seeds averaged). Accuracy "
        "in percent; CodeAlpaca is the negative log-likelihood of the reference in nats per token, lower is better.",
        f"{whose}{sources} The paper gives no intervals; its accuracies rest on 100 to 300 items, "
        "where the 95 % interval of a single one reaches 5 to 10 points to either side.",
        "",
        *markdown(
            [_column(number), "method", *map(_head, table.columns)],
            ([*names, *(" · ".join(texts) for texts in shown)] for names, shown in _texts_by_row(cells)),
        ),
    ]
    lines += ["", f"{int(cells.ours.notna().sum())} of {len(cells)} cells were run."]
    if number == 3:
        lines += ["", _TABLE_3]
    for study in studies:
        if there := [own for own, *_ in STAND_FOR.values() if own in study.methods]:
            lines += ["", f"In `{study.name}` these methods stand for the paper's: {', '.join(there)}."]
        lines += ["", f"## What differs from the paper in `{study.name}`", ""]
        lines += markdown(["setting", "paper", "here"], differences_from_paper(study))
        if text := base_and_published(study):
            lines += ["", f"## What is published of the base model of `{study.name}`", "", text]
        missing = study.missing()
        lines += ["", f"The study is not complete: {'; '.join(missing)}."] if missing else []
    return visible("\n".join(lines) + "\n")


def main(
    what: Annotated[str, typer.Argument(help="Number of the table, 1 to 5, or figure4.")],
    studies: Annotated[list[Path], typer.Argument(help="Folders of studies (figure4: also of runs).")],
    out: Annotated[Path | None, typer.Option(help="Folder to write to; by default tables/ in the first one.")] = None,
    quiet: Quiet = False,
) -> None:
    """The paper's tables 1-5 and figure 4 from studies: the printed number beside ours.

    Table 1: a study per backbone with sources gsm8k, mbpp and mmlu. Table 2: source mmlu, all targets. Table 3: also
    `score_projected: true`. Table 4: as 1. Table 5: also method spd-full-loss. Figure 4: a study for each calibration
    size, or runs with `analyze calibration-size`. What is not there is "not run".
    """
    set_up_logging(quiet)
    console = Console()
    folder = out or studies[0] / "tables"
    name = what.lower().replace("-", "").replace("_", "").replace("table", "")
    if name == "figure4":
        frame = points(studies)
        fig, says = figure_4(frame), points_sentence(frame)
        write_text(folder / "figure4.csv", frame.to_csv(index=False))
        html = page("Figure 4: accuracy and losses by calibration size", fig, says=says)
        write_text(folder / "figure4.html", html)
        console.print(f"{says}\nwritten to {folder / 'figure4.html'} and .csv", highlight=False, markup=False)
        return
    if not name.isdigit():
        raise SPDError(f"unknown table {what!r}; choose from 1, 2, 3, 4, 5, figure4")
    read = [Evidence.read(path) for path in studies]
    cells = fill(int(name), read)
    write_text(folder / f"table{name}.csv", cells.to_csv(index=False))
    write_text(folder / f"table{name}.md", to_markdown(cells, read))
    console.print(_rich(cells))
    for text in (text for study in read for text in base_warnings(study)):
        console.print(text, highlight=False, markup=False)
    console.print(
        f"{int(cells.ours.notna().sum())} of {len(cells)} cells were run; written to {folder / f'table{name}.md'} "
        "and .csv, with what differs from the paper",
        highlight=False, markup=False,
    )  # fmt: skip
    if cells.ours.isna().all():
        table = TABLES[int(name)]
        methods = ", ".join(dict.fromkeys(row.method for row in table.rows))
        sources = table.source or ", ".join(dict.fromkeys(SOURCE_OF.values()))
        console.print(
            f"This table needs methods {methods} on sources {sources}, evaluated on {', '.join(table.columns)}; see "
            "the studies' own report.md for what they have.",
            highlight=False, markup=False,
        )  # fmt: skip


def _blocks(table: PaperTable, studies: Sequence[Evidence]) -> list[tuple[str, list[Row]]]:
    """The models, of the paper and of the studies, with the rows that each gets."""
    models = list(dict.fromkeys(model_of(study) for study in studies))
    printed: dict[str, list[Row]] = {}
    for row in table.rows:
        printed.setdefault(row.backbone, []).append(row)
    any_block = next(iter(printed.values()))
    if len(printed) == 1:  # the paper's numbers stand beside whatever model was run
        return [(model, any_block) for model in models]
    return [*printed.items(), *((model, any_block) for model in models if model not in printed)]


def _cell(studies: Sequence[Evidence], row: Row, dataset: str, source: str) -> tuple[dict[str, Any], str]:
    """Our number from the first study that has it."""
    measure = "completion loss" if dataset in LOSSES else "accuracy"
    for study in studies:
        for method in STAND_FOR.get(row.method, (row.method,)):
            found = mean_score(study, Outcome(source, dataset, "target", row.phase, method, measure))
            if found is not None:
                return {"ours": found.pop("value"), **found}, study.name
    return dict.fromkeys(("ours", "low", "high", "n", "seeds")), ""


def _texts(row: dict[str, Any]) -> tuple[str, str]:
    """The paper's number and ours."""
    is_loss = row["dataset"] in {LABELS[name] for name in LOSSES}
    paper = "-" if pd.isna(row["paper"]) else f"{row['paper']:.3f}" if is_loss else f"{row['paper']:.1f}"
    if pd.isna(row["ours"]):
        return paper, NOT_RUN
    return paper, bracketed(row["ours"], row["low"], row["high"], 3 if is_loss else 1)


def _texts_by_row(cells: pd.DataFrame) -> Iterator[tuple[list[str], list[tuple[str, str]]]]:
    """The paper's number and ours of every dataset, with the names of model and method."""
    for names, part in cells.groupby(["backbone", "method"], sort=False):
        yield list(map(str, names)), [_texts(row) for row in part.to_dict("records")]


def _head(dataset: str) -> str:
    return f"{LABELS[dataset]} {'↓' if dataset in LOSSES else '↑'}"


def _column(number: int) -> str:
    return "backbone" if number == 1 else "our backbone"


def _rich(cells: pd.DataFrame) -> Table:
    """The table for the terminal, with the paper's number over ours."""
    number = int(cells.table.iloc[0])
    whose = "" if number == 1 else f" ({ABLATED})"
    rows = []
    for names, texts in _texts_by_row(cells):
        shown = [
            Text.assemble((paper, "dim"), "\n", (ours, "dim" if ours == NOT_RUN else "bold")) for paper, ours in texts
        ]
        rows.append([*map(Text, names), *shown])
    head = [_column(number), "method", *map(_head, TABLES[number].columns)]
    return terminal(head, rows, show_lines=True, title=f"Table {number}: the paper's number{whose} over ours")
