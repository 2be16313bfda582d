"""What methods wrote, side by side on the same prompts (the paper's Figure 3), and how their corpora differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from statistics import fmean
from typing import Annotated

import pandas as pd
import plotly.graph_objects as go
import typer
from rich.table import Table

from spd_lens.analysis.common import SYMBOLS, Findings, Quiet, bars, figure, line, page
from spd_lens.analysis.corpora.page import corpora_page
from spd_lens.analysis.corpora.sources import Corpora, corpora_sets, shared_prompts
from spd_lens.evaluation import OF_COMPLETIONS, corpus_diagnostics, share_after_answer
from spd_lens.files import write_json, write_text
from spd_lens.generation import Record
from spd_lens.output import set_up_logging, terminal
from spd_lens.stats import Estimate, mean_interval, paired_difference
from spd_lens.tasks import Task


def corpora_table(corpora: Corpora, task: Task | None = None) -> pd.DataFrame:
    """`corpus_diagnostics` of every corpus on the prompts that they share, one row per `method` and `measure`."""
    shared = shared_prompts(corpora).items()
    found = {name: corpus_diagnostics(records, None, task) for name, records in shared}
    return pd.concat(found, names=["method"]).reset_index("method").reset_index(drop=True)


def corpora_differences(corpora: Corpora, task: Task | None = None) -> pd.DataFrame:
    """Each corpus minus the first, paired by prompt: `method, reference, measure, value, low, high, n, unit`.

    Samples of a prompt are averaged first. `after the answer` counts characters, on prompts that both corpora answer.
    Intervals are paired bootstraps at 95 %, each by itself.
    """
    records = shared_prompts(corpora)
    reference, *others = records
    rows = []
    for name in others:
        for measure, (unit, value) in _measures(task).items():
            before, after = _by_prompt(records[reference], value), _by_prompt(records[name], value)
            both = [id for id in before if id in after]
            if both:
                found = paired_difference([before[id] for id in both], [after[id] for id in both])
                rows.append(
                    {"method": name, "reference": reference, "measure": measure, **found.to_row(), "unit": unit}
                )
    return pd.DataFrame(rows)


def corpora_overlaps(corpora: Corpora, null: Sequence[Record] | None = None) -> pd.DataFrame:
    """Share of words that each corpus has in common with the first, in order: `method, value, low, high, n, null`.

    Two texts' share is twice their common words over all words of both (difflib's ratio), over first samples. `null`
    is the first method with another seed: that much differs by the draw alone.
    """
    records = shared_prompts(corpora)
    reference, *others = records
    before = {record.id: record.completion for record in reversed(records[reference])}
    against: list[tuple[str, Iterable[Record], bool]] = [(name, records[name], False) for name in others]
    if null is not None:
        against.append((f"{reference}, another seed", null, True))
    rows = []
    for name, mine, is_null in against:
        after = {record.id: record.completion for record in reversed(list(mine))}
        shares = [
            SequenceMatcher(None, text.split(), after[id].split(), autojunk=False).ratio()
            for id, text in before.items()
            if id in after
        ]
        if shares:
            rows.append({"method": name, **mean_interval(shares).to_row(), "null": is_null})
    return pd.DataFrame(rows)


_SHOWN = ("truncated", "repeated 4-grams", "loops", "duplicates", "in the asked form", "after the answer")


def shares_figure(table: pd.DataFrame, controls: Sequence[str] = ()) -> go.Figure:
    """The shares of a `corpora_table`, one symbol per method; `controls` are grey and open."""
    fig = figure("What the corpora consist of", "share, with 95 % interval", "")
    shown = [measure for measure in _SHOWN if measure in set(table["measure"])]
    names = list(dict.fromkeys(table["method"]))
    for i, name in enumerate(names):
        rows = table[table["method"] == name].set_index("measure").reindex(shown)  # not all have all
        heights = [place + 0.6 * (0.5 - (i + 0.5) / len(names)) for place in range(len(shown))[::-1]]
        line(
            fig, rows["value"], heights, name, index=i, null=name in controls, mode="markers", size=9,
            symbol=SYMBOLS[i % len(SYMBOLS)] + ("-open" if name in controls else ""), text=shown,
            error_x=bars(rows["value"], rows["low"], rows["high"]),
            hovertemplate="%{text}: %{x:.3f}<extra>" + name + "</extra>",
        )  # fmt: skip
    ticks = {"tickvals": list(range(len(shown)))[::-1], "ticktext": shown, "range": [-0.6, len(shown) - 0.4]}
    fig.update_layout(yaxis=ticks, xaxis={"range": [-0.02, 1.02]}, height=140 + 70 * len(shown))
    return fig


def say(differences: pd.DataFrame, overlaps: pd.DataFrame, controls: Sequence[str] = ()) -> str:
    """What differs beyond noise, method by method, and what does not."""
    sentences = []
    for name, rows in differences.groupby("method", sort=False):
        clear = [row for row in rows.itertuples() if not (pd.isna(row.low) or row.low <= 0 <= row.high)]
        told = [f"{row.measure} {row.value:+.2g} [{row.low:.2g}, {row.high:.2g}]" for row in clear]
        verdict = (
            f"{', '.join(told) or 'nothing'} beyond noise, {len(rows) - len(clear)} of {len(rows)} measures within"
        )
        sentences.append(f"{name} minus {rows['reference'].iloc[0]} on {rows['n'].max()} prompts: {verdict}.")
    for row in overlaps.itertuples():
        kind = ", by the draw alone" if row.null else ""
        sentences.append(f"{row.method} shares {row.value:.0%} of the words of the same prompts' first column{kind}.")
    if len(differences):
        sentences.append(f"The {len(differences)} intervals are at 95 % each, not corrected for their number.")
    if not controls:
        sentences.append("No control is among them: any projection changes the text, so a study has a random one.")
    return " ".join(sentences)


def main(
    places: Annotated[
        list[str], typer.Argument(help="A study, a run directory, or corpora as NAME=FILE.jsonl, the reference first.")
    ],
    methods: Annotated[
        str | None, typer.Option(help="Methods of a study that are shown, with commas; the first is the reference.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of a study whose texts are shown; its first if not given.")
    ] = None,
    n: Annotated[int, typer.Option(help="Number of prompts on the page of texts.")] = 12,
    task: Annotated[str | None, typer.Option(help="Task whose answers JSONL files hold.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of that task's data.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; analysis/ of the study or run if not given.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """What each method wrote, on the same prompts: texts side by side, and the corpora's diagnostics."""
    set_up_logging(quiet)
    for found in corpora_sets(places, methods=methods, seed=seed, task=task, data_dir=data_dir, out=out):
        table = corpora_table(found.corpora, found.task)
        differences = corpora_differences(found.corpora, found.task)
        overlaps = corpora_overlaps(found.shown, found.null)
        says = say(differences, overlaps, found.controls)
        text = corpora_page(
            found.title, found.shown, found.task, n=n, says=says,
            table=table[table["measure"].isin(("length", *_SHOWN))],
        )  # fmt: skip
        fig = shares_figure(table, found.controls)
        facts = {"corpora": found.title, "reference": next(iter(found.corpora)), "prompts": int(table["n"].max())}
        folder, name = found.folder, found.name
        written = [
            write_text(folder / f"{name}.csv", table.to_csv(index=False)),
            write_text(folder / f"{name}-differences.csv", differences.to_csv(index=False)),
            write_text(folder / f"{name}-overlaps.csv", overlaps.to_csv(index=False)),
            write_json(folder / f"{name}.json", facts),
            write_text(folder / f"{name}.html", page(f"Corpora of {found.title}", [fig], says=says, facts=facts)),
            write_text(folder / f"{name}-text.html", text),
        ]
        Findings(_rich(found.title, table), says, written).show()


def _measures(task: Task | None) -> dict[str, tuple[str, Callable[[Record], float | None]]]:
    """The unit of each measure, and its value for one completion; None where the completion has none."""
    names = ("length", "truncated", "repeated 4-grams", "loops")
    measures: dict[str, tuple[str, Callable[[Record], float | None]]] = {name: OF_COMPLETIONS[name] for name in names}
    if task is None:
        return measures

    def behind(record: Record) -> float | None:
        return None if task.extract(record.completion) is None else share_after_answer(record, task)

    measures["in the asked form"] = ("share", lambda record: float(task.in_asked_form(record.completion)))
    measures["after the answer"] = ("share", behind)
    return measures


def _by_prompt(records: Iterable[Record], value: Callable[[Record], float | None]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for record in records:
        if (own := value(record)) is not None:
            found.setdefault(record.id, []).append(own)
    return {id: fmean(values) for id, values in found.items()}


def _rich(title: str, table: pd.DataFrame) -> Table:
    shown = table[table["measure"].isin(("length", "prompts", *_SHOWN))]
    rows = [
        [measure, *(
            Estimate(row.value, row.low, row.high, row.n, "").interval if pd.notna(row.low) else f"{row.value:g}"
            for row in own.itertuples()
        )]
        for measure, own in shown.groupby("measure", sort=False)
    ]  # fmt: skip
    return terminal(["measure", *dict.fromkeys(table["method"])], rows, title=f"corpora of {title}")
