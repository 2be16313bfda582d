"""Completions of several methods next to each other: what each adds to the first, and what stands behind its answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher
from importlib.resources import files
from typing import Any

import pandas as pd

from spd_lens.corpus import Record
from spd_lens.diagnostics import settled_at
from spd_lens.tasks import Task

from .corpora_sources import Corpora, shared_prompts
from .reading import document, safe

_MAX_WORDS = 400
"""Texts are compared up to here: matching takes the product of the lengths."""


def corpora_page(
    title: str, corpora: Corpora, task: Task | None = None, *, n: int = 12, says: str = "", table: pd.DataFrame
) -> str:
    """The page as HTML, after the paper's Figure 3; it runs no scripts.

    Words that the first corpus does not have are underlined. Text behind the settled answer is on another ground; the
    paper marks "answer-irrelevant" text by hand, this is what a program can tell.

    Args:
        title: Of what the corpora belong to.
        corpora: By method; the first is the reference.
        task: Says where an answer ends; None marks nothing behind it.
        n: Prompts, the first that all corpora share; one completion of each.
        says: The findings, in sentences.
        table: `corpora_table` rows to show above the texts.
    """
    records = {name: _firsts(own) for name, own in shared_prompts(corpora).items()}
    reference = next(iter(records))
    ids = list(records[reference])[:n]
    key = f"<span><ins>underlined</ins>: not in the completion of {safe(reference)}</span>"
    if task is not None:
        key += '<span><span class="behind">on this ground</span>: behind the answer as the task extracts it</span>'
    cards = "".join(_card({name: own[id] for name, own in records.items()}, task) for id in ids)
    facts = [f"{len(ids)} of {len(records[reference])} shared prompts", "one completion of each", *records]
    body = f'{_numbers(table)}<h2>Texts</h2><p class="key">{key}</p>{cards}'
    style = files("spd_lens.analysis").joinpath("corpora.css").read_text(encoding="utf-8")
    return document(f"What each method wrote: {title}", body, says=says, facts=facts, style=style)


def added_words(before: str, after: str) -> Iterator[tuple[str, bool]]:
    """`after` in pieces with the white space behind each, and whether a piece is new against `before`."""
    old, new = (re.findall(r"^\s+|\S+\s*", text) for text in (before, after))
    rest = "".join(new[_MAX_WORDS:])
    new = new[:_MAX_WORDS]
    before_words, after_words = ([word.strip() for word in words] for words in (old[:_MAX_WORDS], new))
    for what, _, _, low, high in SequenceMatcher(None, before_words, after_words, autojunk=False).get_opcodes():
        if low < high:
            yield "".join(new[low:high]), what != "equal"
    if rest:
        yield rest, rest != "".join(old[_MAX_WORDS:])


def _firsts(records: list[Record]) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for record in records:
        found.setdefault(record.id, record)
    return found


def _card(records: dict[str, Record], task: Task | None) -> str:
    reference = next(iter(records.values()))
    sections = []
    for i, (name, record) in enumerate(records.items()):
        pieces = [(record.completion, False)] if i == 0 else added_words(reference.completion, record.completion)
        place = settled_at(record.completion, task) if task is not None else len(record.completion)
        ended = "cut" if record.finish_reason == "length" else "ended by itself"
        size = f"{record.n_completion_tokens} tokens, {ended}"
        sections.append(
            f'<section><h3>{safe(name)}</h3><p class="size">{size}</p><pre>{_marked(pieces, place)}</pre></section>'
        )
    return (
        f'<article class="card"><header><h3>{safe(reference.id)}</h3></header><pre class="asked">'
        f'{safe(reference.prompt)}</pre><div class="side">{"".join(sections)}</div></article>'
    )


def _marked(pieces: Iterator[tuple[str, bool]] | list[tuple[str, bool]], place: int) -> str:
    """Pieces as HTML, cut where the answer is settled; white space at the edges of a mark stays outside of it."""
    before: list[str] = []
    behind: list[str] = []
    at = 0
    for text, is_new in pieces:
        cut = min(max(place - at, 0), len(text))
        for part, parts in ((text[:cut], before), (text[cut:], behind)):
            parts.append(_inserted(part) if is_new else safe(part))
        at += len(text)
    rest = "".join(behind)
    return "".join(before) + (f'<span class="behind">{rest}</span>' if rest.strip() else rest)


def _inserted(text: str) -> str:
    body = text.strip()
    if not body:
        return safe(text)
    start = text.index(body)
    return f"{safe(text[:start])}<ins>{safe(body)}</ins>{safe(text[start + len(body) :])}"


def _numbers(table: pd.DataFrame) -> str:
    names = list(dict.fromkeys(table["method"]))
    head = "".join(f'<th class="n">{safe(name)}</th>' for name in names)
    rows = []
    for measure, own in table.groupby("measure", sort=False):
        unit = own["unit"].iloc[0]
        cells = "".join(f'<td class="n">{_cell(row)}</td>' for row in own.itertuples())
        rows.append(f"<tr><td>{safe(measure)}{'' if unit == 'share' else f', {safe(unit)}'}</td>{cells}</tr>")
    return (
        f'<div class="numbers panel"><table><tr><th>per completion, 95 % intervals</th>{head}</tr>'
        f"{''.join(rows)}</table></div>"
    )


def _cell(row: Any) -> str:
    places = 1 if row.unit == "tokens" else 2
    interval = "" if pd.isna(row.low) else f" [{row.low:.{places}f}, {row.high:.{places}f}]"
    return f"{row.value:.{places}f}{interval}"
