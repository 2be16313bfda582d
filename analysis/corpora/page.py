"""Completions of several methods next to each other: what each adds to the first, and what stands behind its answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from spd_lens.analysis.common import PACKAGE, word_diff
from spd_lens.analysis.corpora.sources import Corpora, shared_prompts
from spd_lens.evaluation import settled_at
from spd_lens.generation import Record
from spd_lens.output import render
from spd_lens.stats import bracketed
from spd_lens.tasks import Task


def corpora_page(
    title: str, corpora: Corpora, task: Task | None = None, *, n: int = 12, says: str = "", table: pd.DataFrame
) -> str:
    """The page as HTML, after the paper's Figure 3; it runs no scripts.

    Words that the first corpus does not have are underlined. Text behind the settled answer has another background:
    the paper marks "answer-irrelevant" text by hand, and this is what a program can tell.

    Args:
        title: Name of what the corpora belong to.
        corpora: The corpora by method; the first is the reference.
        task: The task, which says where an answer ends; None marks nothing behind it.
        n: How many prompts are shown: the first that all corpora share, with one completion of each.
        says: The findings, in sentences.
        table: `corpora_table` rows to show above the texts.
    """
    records = {name: _firsts(own) for name, own in shared_prompts(corpora).items()}
    reference = next(iter(records))
    ids = list(records[reference])[:n]
    return render(
        "corpora.html", package=PACKAGE, title=f"What each method wrote: {title}", says=says, reference=reference,
        facts=[f"{len(ids)} of {len(records[reference])} shared prompts", "one completion of each", *records],
        has_task=task is not None, methods=list(dict.fromkeys(table["method"])),
        numbers=[(measure, unit := own["unit"].iloc[0],
                  [bracketed(row.value, row.low, row.high, 1 if unit == "tokens" else 2) for row in own.itertuples()])
                 for measure, own in table.groupby("measure", sort=False)],
        cards=[_card({name: own[id] for name, own in records.items()}, task) for id in ids],
    )  # fmt: skip


def added_words(before: str, after: str) -> list[tuple[str, bool]]:
    """`after` in pieces, and whether each is new against `before`."""
    return [(piece.after, not piece.same) for piece in word_diff(before, after) if piece.after]


def _firsts(records: list[Record]) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for record in records:
        found.setdefault(record.id, record)
    return found


def _card(records: dict[str, Record], task: Task | None) -> dict[str, Any]:
    reference = next(iter(records.values()))
    sections = []
    for name, record in records.items():
        is_first = record is reference
        pieces = [(record.completion, False)] if is_first else added_words(reference.completion, record.completion)
        place = settled_at(record.completion, task) if task is not None else len(record.completion)
        ended = "cut" if record.finish_reason == "length" else "ended by itself"
        before, behind = _parted(pieces, place)
        if not any(text.strip() for text, _ in behind):  # white space alone is no text behind the answer
            before, behind = before + behind, []
        size = f"{record.n_completion_tokens} tokens, {ended}"
        sections.append({"name": name, "size": size, "before": before, "behind": behind})
    return {"id": reference.id, "prompt": reference.prompt, "sections": sections}


def _parted(pieces: Iterable[tuple[str, bool]], place: int) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Pieces before and behind where the answer is settled; white space at the edges of a new piece is not new."""
    before: list[tuple[str, bool]] = []
    behind: list[tuple[str, bool]] = []
    at = 0
    for text, is_new in pieces:
        cut = min(max(place - at, 0), len(text))
        for part, parts in ((text[:cut], before), (text[cut:], behind)):
            body = part.strip()
            start, _, end = part.partition(body) if body else (part, "", "")
            parts += [(shown, new) for shown, new in ((start, False), (body, is_new), (end, False)) if shown]
        at += len(text)
    return before, behind
