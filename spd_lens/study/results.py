"""A study's files as tidy tables: one row per item and measure, one row per corpus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from spd_lens import methods
from spd_lens.evaluation import EvalResult, corpus_diagnostics
from spd_lens.files import write_text
from spd_lens.runs import FORCED, MEASURES
from spd_lens.study.config import BASE, named
from spd_lens.study.folder import Cell, Study
from spd_lens.study.reporting.evidence import COLUMNS
from spd_lens.tasks import Task

DIAGNOSTICS = (
    "completions", "length", "length sd", "short", "truncated", "duplicates", "repeated 4-grams", "loops", "distinct-2",
    "answered", "after the answer",
)  # fmt: skip
"""Rows of `corpus_diagnostics` that a study keeps: shares, counts and lengths."""
_SCORED = ("accuracy", "accuracy by likelihood", "tokens")


def results_frame(folder: str | Path) -> pd.DataFrame:
    """Everything that a study has measured so far, tidy: `[row]` with the columns of `COLUMNS`.

    `role` is `target` or `side effect`; `phase` is `trained` or `projected` (before any training). The base model's
    rows have neither source nor phase nor seed, and no KL from itself; side effects have no aligned loss. Measures are
    those of `spd-lens compare`, and `format` (1 if the answer stands in the form that was asked for) and `finished`
    (1 if the model ended by itself). Losses and KL are in nats per token.
    """
    study = Study.open(folder)
    config = study.config
    known = {key: config.task(name) for key, name in config.shared.targets.items()}
    rows = [row for cell in [study.base(), *study.cells(config)] for row in _rows(cell, known)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _rows(cell: Cell, known: Mapping[str, Task]) -> Iterator[tuple[Any, ...]]:
    def row(target: str, role: str, phase: str, item: str, measure: str, value: float) -> tuple[Any, ...]:
        if cell.method == BASE:
            return ("", target, role, BASE, "", "", item, measure, value)
        return (cell.source, target, role, cell.method, phase, cell.seed, item, measure, value)

    for target, task in known.items():
        if cell.effects_path(target).exists():
            yield from (row(target, "target", *rest) for rest in _forced(cell, target, side=False))
        for phase in ("trained", "projected"):
            if cell.result_path(target, phase).exists():
                scored = _scored(cell.result(target, phase), task)
                yield from (row(target, "target", phase, *rest) for rest in scored)
    for path in sorted((cell.path / "side_effects").glob("*.json")):
        yield from (row(path.stem, "side effect", *rest) for rest in _forced(cell, path.stem, side=True))


def _forced(cell: Cell, name: str, *, side: bool) -> Iterator[tuple[str, str, str, float]]:
    """Rows `(phase, item, measure, value)` of what was measured teacher-forced."""
    for phase, items in cell.effects(name, side=side).items():
        for item in items:
            for measure, field in FORCED.items():
                # the base has no KL from itself; a side effect's text is scored on all tokens, so one loss is enough
                if (cell.method == BASE and field == "kl") or (side and field == "aligned_loss"):
                    continue
                if (value := getattr(item, field)) is not None:
                    yield phase, item.id, measure, value


def _scored(result: EvalResult, task: Task) -> Iterator[tuple[str, str, float]]:
    """Rows `(item, measure, value)` of scored completions."""
    for item in result.items:
        for measure in _SCORED:
            if (value := MEASURES[measure](item)) is not None:
                yield item.id, measure, value
        yield item.id, "format", float(task.in_asked_form(item.completion))
        yield item.id, "finished", float(item.finish_reason != "length")


def corpora_frame(folder: str | Path) -> pd.DataFrame:
    """Diagnostics of every finished corpus as it was trained on, one row per source, method and seed."""
    study = Study.open(folder)
    config = study.config
    sources = {key: config.task(name) for key, name in named(config.sources).items()}
    rows = []
    for cell in study.cells(config):
        if cell.has_corpus:
            kept = methods.get(cell.method).curated(cell.corpus)
            found = corpus_diagnostics(kept, task=sources[cell.source]).set_index("measure")["value"]
            found = found.reindex(list(DIAGNOSTICS))  # a corpus without answers has no row on what stands after them
            rows.append({"source": cell.source, "method": cell.method, "seed": cell.seed, **found})
    return pd.DataFrame(rows)


def write_tables(folder: str | Path) -> None:
    """Write `results.csv` and `corpora.csv` from the files that are there."""
    folder = Path(folder)
    for name, frame in (("results", results_frame(folder)), ("corpora", corpora_frame(folder))):
        write_text(folder / f"{name}.csv", frame.to_csv(index=False))
