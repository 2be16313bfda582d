"""`report.md`: what a study found, gains beside side effects, with its controls and what it cannot say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from spd_lens import methods
from spd_lens.evaluation import OUTCOMES, SAYS
from spd_lens.files import write_text
from spd_lens.output import inert, markdown, visible
from spd_lens.runs import in_words, quoted
from spd_lens.stats import TOO_FEW, WITHIN_NOISE, Finding, grade
from spd_lens.study.config import BASE
from spd_lens.study.reporting.differences import (
    ALPHA,
    FLIPS_PER_COMPARISON,
    MIN_FLIPS,
    NOT_EVERY_SEED,
    RANDOM,
    better,
    differences,
    estimate_of,
    means,
)
from spd_lens.study.reporting.evidence import PRIMARY, Evidence, in_order
from spd_lens.study.reporting.published import base_and_published
from spd_lens.study.reporting.setup import differences_from_paper, protocol_of
from spd_lens.study.reporting.verdict import answers

PHASES = {"trained": "After training", "projected": "Under the projection, before any training"}
UNITS = {
    **{heading: "nats per token" for outcome, heading in OUTCOMES.items() if outcome != "token_accuracy"},
    "aligned loss": "nats per correctness token", "tokens": "mean length in tokens",
}  # fmt: skip
NAMES = {"tokens": "length", "format": "format compliance", "finished": "ended by itself"}
"""Longer names that a report has for some measures."""


@dataclass(frozen=True)
class Report:
    """What a study found: its tables and sentences, each made once."""

    evidence: Evidence

    @cached_property
    def means(self) -> pd.DataFrame:
        """The mean of every measure."""
        return means(self.evidence)

    @cached_property
    def differences(self) -> pd.DataFrame:
        """Paired differences, with their intervals and p-values."""
        return differences(self.evidence)

    @cached_property
    def text(self) -> str:
        """The report in Markdown."""
        evidence, table = self.evidence, self.differences
        parts = [f"# Study: {_code(evidence.name)}", _gaps(evidence), _answers(evidence, table), _published(evidence)]
        for source in evidence.sources:
            for phase, title in PHASES.items():
                rows, changes = (t[(t.source == source) & (t.phase == phase)] for t in (self.means, table))
                if (rows.method != BASE).any():
                    heading = f"## {title}: source {_code(source)}"
                    parts += [heading, overview(rows, changes), comparisons(changes), absolute(rows)]
        parts += [_grades(evidence), _corpora(evidence), _setup(evidence), _how_to_read(table)]
        return visible("\n\n".join(part for part in parts if part) + "\n")


def write_report(folder: str | Path) -> Report:
    """Write `report.md` and `comparisons.csv` (every difference with its p-values) into a study's folder.

    Works on a study that is not finished, and says what it lacks.

    Raises:
        SPDError: the folder has no results.
    """
    report = Report(Evidence.read(folder))
    write_text(Path(folder) / "comparisons.csv", report.differences.to_csv(index=False))
    write_text(Path(folder) / "report.md", report.text)
    return report


def _gaps(evidence: Evidence) -> str:
    """What is missing, which a reader should know before anything else."""
    if not (missing := evidence.missing()):
        return ""
    says = (
        "**This study is not complete.** What follows is about what is there; corrected p-values will change when the "
        "rest comes in."
    )
    return "\n".join([says, "", *(f"- {inert(line)}." for line in missing)])


def _answers(evidence: Evidence, table: pd.DataFrame) -> str:
    lines = ["## What it says"]
    for source, found in answers(evidence, table).items():
        lines += ["", f"### Source {_code(source)}"] if len(evidence.sources) > 1 else []
        for answer in found:
            lines += ["", f"**{answer.question}** {inert(answer.headline)}", ""]
            lines += [f"- {inert(detail)}" for detail in answer.details]
    if len(evidence.seeds) < 2:
        lines += ["", "One seed: how much of this another seed would change is not known."]
    return "\n".join(lines)


def _grades(evidence: Evidence) -> str:
    """How far the evidence for each method's subspaces and adapters reaches, over all seeds."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in evidence.findings:
        groups.setdefault((finding.method, finding.kind), []).append(finding)
    grades = {who: grade(found) for who, found in groups.items()}
    rows = [[_code(who), kind, str(found), _code(found.reasons[-1])] for (who, kind), found in grades.items()]
    says = "Computed from `findings.json`; every level and what it asks for is in docs/evidence.md."
    columns = ["method", "of", "grade", "by"]
    return "\n".join(["## Evidence", "", *markdown(columns, rows), "", says]) if rows else ""


def _published(evidence: Evidence) -> str:
    text = base_and_published(evidence)
    return f"## The base model, and what is published of it\n\n{text}" if text else ""


def overview(rows: pd.DataFrame, changes: pd.DataFrame) -> str:
    """Change from base of every method: gains and side effects in one table (Markdown).

    Args:
        rows: Means of one source and phase.
        changes: Differences of the same.
    """
    names = [name for name in dict.fromkeys(rows.method) if name != BASE]
    shown = pd.concat([changes[changes.reference == BASE], rows[rows.measure == "KL from base"]])
    by_place = {(r["role"], r["target"], r["measure"], r["method"]): _change(r) for r in shown.to_dict("records")}
    body = []
    for place in _places(rows):
        found = [by_place.get((*place, name), "-") for name in names]
        if set(found) != {"-"}:
            body.append([_where(*place), *found])
    lines = [
        "### Change from base, gains and side effects",
        "",
        "Paired by item, seeds averaged, 95 % interval. **Bold** where interval, corrected test and every seed agree; "
        "KL is the distance from the base itself.",
        "",
        *markdown(["measure", *names], body),
    ]
    return "\n".join(lines) if body else ""


def comparisons(changes: pd.DataFrame) -> str:
    """Paired differences to everything but the base (Markdown): primary outcomes, then accuracy, then what stands."""
    others = changes[changes.reference != BASE]
    lines = []
    primary = others[others.family == "primary"]
    accuracy = others[(others.measure == "accuracy") & (others.role == "target")]
    rest = others.drop(index=[*primary.index, *accuracy.index])
    standing = rest[~rest.verdict.isin([WITHIN_NOISE, TOO_FEW])]
    if not others.empty:
        columns = ["measure", "difference", "mean [95 %]", "range over seeds", "p", "corrected p", "verdict"]
        shown = pd.concat([primary, accuracy, standing])
        lines += [
            f"### Against {_code(RANDOM)} and between methods",
            "",
            *markdown(columns, map(_comparison, shown.to_dict("records"))),
            "",
            f"{len(rest) - len(standing)} other comparisons of secondary measures do not stand; all are in "
            "`comparisons.csv`.",
        ]
    dropped = changes[changes.n_dropped > 0]
    if not dropped.empty:
        worst = dropped.loc[dropped.n_dropped.idxmax()]
        lines += [
            "",
            f"{len(dropped)} comparisons leave out items that a method or a seed lacks, at most {worst.n_dropped} "
            f"({inert(worst.measure)}, {_code(worst.target)}, {worst.method} and {worst.reference}).",
        ]
    return "\n".join(lines)


def absolute(rows: pd.DataFrame) -> str:
    """The mean of every measure and method, in a table for each target and each side effect (Markdown)."""
    lines = []
    n_planned = rows.n_seeds.max()
    for (role, target), part in rows.groupby(["role", "target"], sort=False):
        measures = in_order(part.measure)
        body = []
        for name, own in part.groupby("method", sort=False):
            by_measure = own.set_index("measure")
            few = own.n_seeds.min()
            label = f"{name} ({few} of {n_planned} seeds)" if name != BASE and few < n_planned else str(name)
            body.append(
                [label, *(estimate_of(by_measure.loc[m]).interval if m in by_measure.index else "-" for m in measures)]
            )
        n = sorted(part.n.unique())
        items = str(n[0]) if len(n) == 1 else f"{n[0]} to {n[-1]}"
        kind = "" if role == "target" else ", side effect"
        lines += [f"### Means on {_code(target)}{kind}: {items} items", ""]
        lines += [*markdown(["method", *map(_heading, measures)], body), ""]
    return "\n".join(lines).strip()


def _places(rows: pd.DataFrame) -> list[tuple[str, str, str]]:
    """`(role, target, measure)` in the order of reading: primary, accuracy, side effects, the rest."""
    found = list(dict.fromkeys(rows[["role", "target", "measure"]].itertuples(index=False, name=None)))

    def rank(place: tuple[str, str, str]) -> int:
        role, _, measure = place
        if role != "target":
            return len(PRIMARY) + 1
        if measure in PRIMARY:
            return PRIMARY.index(measure)
        return len(PRIMARY) + (0 if measure.startswith("accuracy") else 2)

    return sorted(found, key=rank)


def _where(role: str, target: str, measure: str) -> str:
    return f"{_name(measure)}, {_code(target)}{'' if role == 'target' else ' *(side effect)*'}"


def _change(row: Mapping[str, Any]) -> str:
    """A difference with its interval, and a word where it stands."""
    text = estimate_of(row).interval
    if row["measure"] == "KL from base" or row["verdict"] in (WITHIN_NOISE, TOO_FEW):
        return text
    if row["verdict"] == NOT_EVERY_SEED:
        return f"{text} ({row['verdict']})"
    return f"**{text}** {better(row['measure'], row['verdict']) or row['verdict']}"


def _comparison(row: dict[str, Any]) -> list[str]:
    word = better(row["measure"], row["verdict"])
    low, high = row["seeds_low"], row["seeds_high"]
    return [
        _where(row["role"], row["target"], row["measure"]), f"{row['method']} − {row['reference']}",
        estimate_of(row).interval, "-" if pd.isna(low) else f"{low:.2g} to {high:.2g}", f"{row['p']:.2g}",
        f"{row['p_holm']:.2g}", f"**{row['verdict']}** ({word})" if word else row["verdict"],
    ]  # fmt: skip


def _corpora(evidence: Evidence) -> str:
    """What each method trained on: numbers averaged over seeds."""
    corpora = evidence.corpora
    keys = [key for key in ("source", "method") if key in corpora]
    numbers = [c for c in corpora.select_dtypes("number") if c not in (*keys, "seed")]
    if corpora.empty or "method" not in keys or not numbers:
        return ""
    body = []
    for key, own in corpora.groupby(keys, sort=False)[numbers]:
        spread = own.max() - own.min()
        body.append([*key, *(
            "-" if pd.isna(mean) else f"{mean:.3g}" + (f" (±{spread[c] / 2:.2g})" if spread[c] else "")
            for c, mean in own.mean().items()
        )])  # fmt: skip
    head = [name.replace("_", " ") for name in (*keys, *numbers)]
    says = "Mean over seeds, in brackets half the range."
    return "\n".join(["## Corpora that were trained on", "", says, "", *markdown(head, body)])


def _setup(evidence: Evidence) -> str:
    lines = ["## Set-up, and what differs from the paper", ""]
    known = methods.names()
    lines += [f"- Protocol: {inert(protocol)}"] if (protocol := protocol_of(evidence)) else []
    lines += [f"- `{m}`: {inert(methods.get(m).says)}" for m in evidence.methods if m in known]
    lines += [
        "",
        *markdown(["setting", "paper", "this study"], [map(inert, row) for row in differences_from_paper(evidence)]),
    ]
    lines += ["", "The paper gives one seed, no intervals and no random-subspace control."]
    facts = evidence.facts
    stages = {name: f"{entry['seconds']:.0f} s" for name, entry in (facts.get("measured") or {}).items()}
    shown = {"Weights": facts.get("weights"), "Machine": facts.get("machine"), "Versions": facts.get("versions")}
    left_out = in_words(facts["left_out"]) if "left_out" in facts else None
    known_facts = {**shown, "Left out": left_out, "Time": stages}
    lines += ["", *(f"- {name}: {inert(_flat(value))}" for name, value in known_facts.items() if _flat(value))]
    return "\n".join(lines).strip()


def _flat(value: Any) -> str:
    """A fact of `study.json` on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items() if not isinstance(entry, dict | list))
    return "" if value is None else str(value)


def _how_to_read(table: pd.DataFrame) -> str:
    sizes = {family: int((table.family == family).sum()) for family in ("primary", "secondary")}
    flips = max(MIN_FLIPS, FLIPS_PER_COMPARISON * max(sizes.values()))
    primary = [measure for measure in PRIMARY if (table.measure == measure).any()]
    told = [(heading, SAYS[outcome]) for outcome, heading in OUTCOMES.items() if (table.measure == heading).any()]
    return "\n".join(
        [
            "## How to read this",
            "",
            "- Items are the sample. Each item's scores are averaged over seeds and paired with the other method's "
            "on the same item; intervals are 95 % bootstrap intervals over items (BCa; Student's t below ten), and "
            f"p is of a sign-flip test over items (exact for few items, else up to {flips} random flips).",
            f"- Corrected p is Holm's, over {sizes['primary']} comparisons of the primary outcomes "
            f"({' and '.join(primary)}, on targets) and, apart, over {sizes['secondary']} of all other measures, "
            "sources and phases together.",
            f"- A direction is claimed only if corrected p is at most {ALPHA:g}, the interval excludes 0 and every "
            "seed shows the same sign. Other items are thereby accounted for; other seeds as far as those here go.",
            "- KL from base is not tested against the base: it is the difference to it. Less KL is less change, not "
            "better. Losses and KL are teacher-forced on gold completions, in nats per token.",
            *(f"- {heading[0].upper()}{heading[1:]}: {says}" for heading, says in told),
        ]
    )


def _name(measure: str) -> str:
    return inert(NAMES.get(measure, measure))


def _heading(measure: str) -> str:
    return f"{_name(measure)} ({UNITS[measure]})" if measure in UNITS and measure != "tokens" else _name(measure)


def _code(text: str) -> str:
    return quoted(text).replace("|", "\\|")
