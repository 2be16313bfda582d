"""What was found, in sentences and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from rich.table import Table

from spd_lens.analysis.gain.completions import COMPONENTS, FINAL, RATES, REFERENCE, SCORERS, Opened, differing
from spd_lens.analysis.gain.factorial import FACTORS, OUTCOMES, constant, prompt_format
from spd_lens.analysis.gain.split import PARTS
from spd_lens.output import inert, markdown, terminal, visible
from spd_lens.stats import bracketed
from spd_lens.study import BASE, FOCUS

SAYS = (
    "Every completion is scored three times: as it is, cut at the first question that follows its answer, and cut by "
    "rules that look for a stated final answer wherever it stands. The change of the score over the base model is the "
    "sum of three changes: **stopping** is what stands behind that first question (the score of the whole minus that "
    "of the cut), **format** is where the answer stands (the cut under the scorer minus the cut under the final-answer "
    "rules), and **the rest** is the change under the final-answer rules, which neither helps."
)
SCORERS_SAY = (
    f"Scorers: `{FINAL}` takes the {SCORERS[FINAL]} and `{REFERENCE}` the {SCORERS[REFERENCE]}. The final-answer rules "
    "look nowhere else than in the cut, so that under them format is 0 by construction and stopping too, but for texts "
    "that they cut otherwise the second time. The line marked * is the study's own scorer."
)
CODE_SAYS = (
    "Programs are cut at the end of the first fenced block that defines something, or without a fence at the first "
    "line behind a definition that is not code or asks for something else; where nothing is defined, at the first line "
    "that asks."
)
INTERVALS = (
    "Scores and changes are in points of 100. Intervals are 95 % bootstraps over items with seeds averaged, each for "
    "itself; {n} scores and components were compared, and their p-values (sign flips over items) are corrected for "
    "that number (Holm). Rates have intervals alone. A change of 0 without an interval: no completion has any of it."
)
RATES_SAY = (
    "Rates are shares of completions: those that the model ended by itself, that run on into another question behind "
    "their answer, that the token limit cut, in which the final-answer rules find an answer, and whose answer has the "
    "form that the prompt asks for, if it asks for one."
)
FACTORIAL = (
    "Gain is the score minus the base model's, of the same study and under the same scorer. A main effect is the later "
    "level minus the earlier one, an interaction the difference of two such differences (factors coded ±½), averaged "
    "over the settings of the other factors in which all of its levels were run (their number is under `over`). The "
    "{n} effects on gains are corrected for their number (Holm); those on other outcomes have intervals alone. The "
    "largest stand first."
)


def report(
    studies: Sequence[Opened],
    split: pd.DataFrame,
    cells: pd.DataFrame,
    effects: pd.DataFrame,
    factors: Mapping[tuple[str, str], Mapping[Any, Any]],
    beside: pd.DataFrame,
    found: Sequence[str],
    notes: Sequence[str],
) -> str:
    """The whole report in Markdown; `found` are its conclusions."""
    n = int(split.p_holm.notna().sum())
    told = (*(f"- {sentence}" for sentence in found), "", SAYS, "", SCORERS_SAY, "", CODE_SAYS)
    lines = ["# Where the gain comes from", "", *told, "", INTERVALS.format(n=n), "", RATES_SAY, ""]
    lines += [line for note in notes for line in (note, "")]
    lines += _studies(studies)
    for (study, source, target), part in split.groupby(["study", "source", "target"], sort=False):
        lines += ["", f"## {inert(study)}: {inert(source)} → {inert(target)}", "", *_split(part), "", *_rates(part)]
    lines += ["", "## Which factor moves which number", "", FACTORIAL.format(n=int(effects.p_holm.notna().sum()))]
    for source, target in factors:
        lines += ["", *_factorial(source, target, factors[source, target], cells, effects)]
    if not beside.empty:
        lines += ["", *_beside(beside)]
    return visible("\n".join(lines) + "\n")


def shown(split: pd.DataFrame) -> Table:
    """The split for the terminal: the studies' own scorers."""
    rows = []
    for key, part in split[split.own & (split.method != BASE)].groupby(
        ["study", "source", "target", "method"], sort=False
    ):
        by_name = part.set_index("quantity")
        study, source, target, method = map(str, key)
        gains = [_gain(by_name.loc["score"]), *(f"{100 * by_name.loc[name].gain:+.1f}" for name in COMPONENTS)]
        rows.append([study, f"{source} → {target}", method, *gains])
    head = ["study", "source → target", "method", "change", *COMPONENTS]
    return terminal(head, rows, title="Change of the score over the base model, in points")


def conclusions(split: pd.DataFrame, effects: pd.DataFrame) -> list[str]:
    """What SPD's change is made of, and what is told from 0 after correction, in sentences."""
    said = []
    for (study, source, target), part in split[split.own & (split.method == FOCUS)].groupby(
        ["study", "source", "target"], sort=False
    ):
        gain = 100 * part.set_index("quantity").gain
        made_of = ", ".join(f"{name} {gain[name]:+.1f}" for name in COMPONENTS)
        said.append(f"{FOCUS} from {source} on {target} ({study}): {gain['score']:+.1f} points = {made_of}.")
    own = split[split.own & (split.method != BASE) & split.quantity.isin(COMPONENTS)]
    sure = own[own.p_holm <= 0.05]
    told = [
        f"Told from 0: {row.quantity} of {row.method} from {row.source} on {row.target} ({row.study}), {_gain(row)}."
        for row in sure.sort_values("gain", key=abs, ascending=False).head(5).to_records()
    ] or ["No component of any method is told from 0 after correction for the number of comparisons."]
    said += told
    moved = effects[(effects.outcome == "gain") & (effects.p_holm <= 0.05)]
    said += [
        f"Moves the gain of {row.source} on {row.target}: {row.effect} ({row.contrast}), {_points(row)} points."
        for row in moved.head(5).to_records()
    ] or ["No factor is shown to move the gain."]
    return said


def _studies(studies: Sequence[Opened]) -> list[str]:
    rows = []
    for one in studies:
        prompts = prompt_format(one)
        padded = {one.config.cell(source, one.config.seeds[0]).loss_on_padding for source in one.config.sources}
        own = {getattr(task, "scoring", FINAL) for task in one.targets.values()}
        rows.append(
            [
                f"`{one.name}`", one.model, prompts, " / ".join("yes" if p else "no" for p in sorted(padded)),
                " / ".join(sorted(own)), ", ".join(one.config.trained), len(one.config.seeds),
            ]
        )  # fmt: skip
    lines = _table(["study", "model", "prompts", "padding in the loss", "own scorer", "methods", "seeds"], rows)
    known = ("loss_on_padding", "prompt_format")
    if other := {key: values for key, values in differing(studies).items() if key not in known}:
        listed = "; ".join(f"{key} ({', '.join(values)})" for key, values in other.items())
        lines += [
            "",
            f"The studies differ in more than the factors, and effects of padding and prompts mix with it: {listed}.",
        ]
    return lines


def _split(part: pd.DataFrame) -> list[str]:
    rows = []
    for (scorer, method), own in part.groupby(["scorer", "method"], sort=False):
        by_name = own.set_index("quantity")
        score = by_name.loc["score"]
        mark = "*" if score.own else ""
        level = _level(score, 100, 1)
        if method == BASE:
            rows.append([f"{scorer}{mark}", method, level, *[""] * 5])
            continue
        gains = [_gain(by_name.loc[name]) for name in PARTS]
        corrected = ", ".join(_p(by_name.loc[name].p_holm) for name in PARTS)
        rows.append([f"{scorer}{mark}", method, level, *gains, corrected])
    names = ["scorer", "method", "score", "change", "the rest", "format", "stopping", "corrected p of the four"]
    return _table(names, rows)


def _rates(part: pd.DataFrame) -> list[str]:
    rows = []
    for method, own in part[part.own].groupby("method", sort=False):
        by_name = own.set_index("quantity")
        shares = [_level(by_name.loc[name], 100, 0) for name in RATES]
        rows.append([method, *shares, _level(by_name.loc["tokens"], 1, 0)])
    names = ["method", "ends by itself", "runs on", "cut at the limit", "answer found", "asked form", "tokens"]
    return _table([f"{name} (%)" if name in RATES else name for name in names], rows)


def _factorial(
    source: str, target: str, points: Mapping[Any, Any], cells: pd.DataFrame, effects: pd.DataFrame
) -> list[str]:
    lines = [f"### {inert(source)} → {inert(target)}", ""]
    if fixed := constant(points):
        lines += [f"The same throughout: {', '.join(f'{name} ({level})' for name, level in fixed.items())}.", ""]
    own = cells[(cells.source == source) & (cells.target == target)]
    rows = []
    for levels, part in own.groupby([*FACTORS, "study", "method"], sort=False):
        by_name = part.set_index("outcome")
        numbers = [_level(by_name.loc[name], *_form(name)) for name in OUTCOMES]
        rows.append([*levels, *numbers])
    lines += _table([*FACTORS, "study", "method", *map(_head, OUTCOMES)], rows)
    found = effects[(effects.source == source) & (effects.target == target)]
    if found.empty:
        return [*lines, "", "No factor varies here."]
    rows = [
        [
            _head(row.outcome), row.effect, row.contrast, _level(row, *_form(row.outcome)[:2], "+"), row.contexts,
            "" if pd.isna(row.p_holm) else _p(row.p_holm),
        ]
        for row in found.itertuples()
    ]  # fmt: skip
    return [*lines, "", *_table(["number", "effect", "contrast", "size", "over", "corrected p"], rows)]


def _beside(beside: pd.DataFrame) -> list[str]:
    rows = [
        [
            row.study, row.target, f"{row.scorer}{'*' if row.own else ''}", row.method, f"{row.paper_base:.1f}",
            f"{row.paper_gain:+.1f}", f"{row.base:.1f}", bracketed(row.gain, row.low, row.high, 1, "+"),
            *(f"{getattr(row, name):+.1f}" for name in COMPONENTS),
        ]
        for row in beside.itertuples()
    ]  # fmt: skip
    names = "study", "target", "scorer", "method", "paper: base", "paper: gain", "base", "gain"
    head = [*names, "the rest", "format", "stopping"]
    return [
        f"## Beside the paper's table 1 ({beside.backbone.iloc[0]})",
        "",
        "In points. The paper prints one run without intervals and does not state its scorer; the reference code "
        "(github.com/gh540-svg/hahaha, commit e249fec) takes the last number.",
        "",
        *_table(head, rows),
    ]


def _table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """A table whose cells cannot break out of it or become markup."""
    return markdown(head, ([inert(cell) for cell in row] for row in rows))


def _form(outcome: str) -> tuple[int, int, str]:
    """Factor, decimals and sign that an outcome is shown with."""
    return {"gain": (100, 1, "+"), "tokens": (1, 1, "")}.get(outcome, (100, 1, ""))


def _head(outcome: str) -> str:
    return f"{outcome} (%)" if outcome == "ends by itself" else outcome


def _level(row: Any, factor: int, places: int, sign: str = "") -> str:
    low, high = (float("nan") if end is None else factor * end for end in (row.low, row.high))
    return bracketed(factor * row.value, low, high, places, sign)


def _points(row: Any) -> str:
    return _level(row, 100, 1, "+")


def _p(value: float) -> str:
    return "-" if pd.isna(value) else f"{value:.2g}"


def _gain(row: Any) -> str:
    low, high = (float("nan") if end is None else 100 * end for end in (row.gain_low, row.gain_high))
    return bracketed(100 * row.gain, low, high, 1, "+" if row.gain else "")
