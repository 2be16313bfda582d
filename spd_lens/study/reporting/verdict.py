"""The two questions of a study, answered from its differences: did SPD help, and was it the gradient subspace?

Nothing is claimed where interval, corrected test and every single seed do not agree. On targets whose solutions have
results to compute, the answer rests on the loss on them and on accuracy: most of the scored answer can be copied there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from spd_lens.stats import TOO_FEW
from spd_lens.study.config import BASE
from spd_lens.study.reporting.differences import FOCUS, NOT_EVERY_SEED, RANDOM, better, estimate_of
from spd_lens.study.reporting.evidence import Evidence

LOSS, RESULTS, KL = "aligned loss", "results loss", "KL from base"
BESIDE = (LOSS, "copied-answer loss", "answer-only loss")
"""What stands beside the loss on results, which none of them can replace."""
PLAIN = ("psr", "psr-reference", "ssd", "ssd-reference", "ssd-config")
"""Methods that retrain on own outputs without any projection: SPD must beat them to have helped."""
Rows = Mapping[str, Mapping[str, Any]]
"""Differences by target, each a row of the table."""


@dataclass(frozen=True)
class Answer:
    """The answer to one question: a sentence or two, and the numbers that they rest on."""

    question: str
    headline: str
    details: list[str] = field(default_factory=list)


def answers(evidence: Evidence, table: pd.DataFrame) -> dict[str, list[Answer]]:
    """Both answers for every source.

    Args:
        evidence: The study.
        table: The differences of the study.
    """
    asked = {"Did SPD help?": _helped, "Was it the gradient subspace?": _subspace}
    if FOCUS not in evidence.methods:
        nothing = [Answer(question, f"Not asked: the study has no method {FOCUS!r}.") for question in asked]
        return dict.fromkeys(evidence.sources, nothing)
    return {
        source: [Answer(question, *answer(evidence, table, source)) for question, answer in asked.items()]
        for source in evidence.sources
    }


def _helped(evidence: Evidence, table: pd.DataFrame, source: str) -> tuple[str, list[str]]:
    against_base = _losses(table, source, "trained", BASE)
    accuracy = _rows(table, source, "trained", "accuracy", BASE)
    if not against_base and not accuracy:
        return f"Not answered: there are no results of {FOCUS} after training on {source} yet.", []
    headline, good = _headline(against_base or accuracy), _states(against_base, "better")
    by_results = any(row["measure"] == RESULTS for row in against_base.values())
    plain = {method: _losses(table, source, "trained", method) for method in PLAIN if method in evidence.methods}
    equal = [method for method, rows in plain.items() if not set(good) & set(_states(rows, "better"))]
    if good and equal:
        headline += f" But no more than {_and(equal)} did, as far as this study can tell."
    if by_results and accuracy:
        headline += f" {_headline(accuracy)}"
    details = [f"Against the base model: {_listed(against_base, LOSS)}."]
    beside = [(measure, _rows(table, source, "trained", measure, BASE)) for measure in BESIDE if by_results]
    details += [f"Beside it, against the base model: {_listed(rows, measure)}." for measure, rows in beside if rows]
    details += [f"Against {method}: {_listed(rows, LOSS)}." for method, rows in plain.items()]
    details += [f"Against the base model: {_listed(accuracy, 'accuracy')}."]
    return headline, [*details, *_side_effects(table, source)]


def _headline(rows: Rows) -> str:
    """Whether the trained model is better than the base, by one measure."""
    measure = _and(list(dict.fromkeys(row["measure"] for row in rows.values())))
    good, bad = _states(rows, "better"), _states(rows, "worse")
    if good and bad:
        return f"By {measure} it did on {_and(good)} and did harm on {_and(bad)}."
    if good:
        where = "" if len(good) == len(rows) else f", on {_and(good)} ({len(good)} of {len(rows)} targets)"
        return f"By {measure} yes{where}."
    if bad:
        return f"By {measure} no: it did harm on {_and(bad)}."
    return f"Not measurably: by {measure} it is not told apart from the base model."


def _subspace(evidence: Evidence, table: pd.DataFrame, source: str) -> tuple[str, list[str]]:
    if RANDOM not in evidence.methods:
        return f"This study cannot say: it has no {RANDOM!r} to compare with.", []
    headline, details = [], []
    for phase, when in (("trained", "After training"), ("projected", "Under the projection, before training")):
        loss = _losses(table, source, phase, RANDOM)
        kl = _rows(table, source, phase, KL, RANDOM)
        if not loss:
            headline.append(f"{when}: {LOSS} was not measured against {RANDOM}.")
        else:
            headline.append(f"{when}: {_reading(loss, _losses(table, source, phase, BASE))}.")
        if loss or kl:
            details.append(f"{when}, against {RANDOM}: {_listed(loss, LOSS)}; {_listed(kl, KL)}.")
    return " ".join(headline), [*details, *_other_controls(evidence, table, source)]


def _reading(random: Rows, base: Rows) -> str:
    """What a difference to random directions means, given the difference to the base."""
    good, bad = _states(random, "better"), _states(random, "worse")
    above = set(_states(base, "better"))
    gains, saved = [t for t in good if t in above], [t for t in good if t not in above]
    parts = []
    if gains:
        parts.append(f"on {_and(gains)} the gradients' directions bring a gain that random ones do not")
    if saved:
        parts.append(f"on {_and(saved)} they are better than random ones but not than the base: less harm, no gain")
    if bad:
        parts.append(f"on {_and(bad)} random directions did better")
    if unsettled := [target for target, row in random.items() if row["verdict"] == NOT_EVERY_SEED]:
        parts.append(f"on {_and(unsettled)} there is a difference to random ones, but not in every seed")
    if not parts:
        ends = [abs(end) for row in random.values() for end in (row["low"], row["high"]) if end == end]
        parts = ["nothing sets the gradients' directions apart from random ones of the same ranks"]
        parts += [f"the intervals exclude differences beyond {max(ends):.2g} nats, not smaller ones"] if ends else []
    return "; ".join(parts)


def _other_controls(evidence: Evidence, table: pd.DataFrame, source: str) -> list[str]:
    """Controls other than `spd-random`, by whether SPD is better than they are on any target."""
    found: dict[str, list[str]] = {"better than": [], "worse than": [], "not told apart from": []}
    measures: dict[str, None] = {}
    for method in (name for name in evidence.methods if name.startswith(f"{FOCUS}-") and name != RANDOM):
        if rows := _losses(table, source, "trained", method):
            measures |= {str(row["measure"]): None for row in rows.values()}
            state = next((f"{word} than" for word in ("worse", "better") if _states(rows, word)), "not told apart from")
            found[state].append(method)
    parts = [f"{state} {_and(names)}" for state, names in found.items() if names]
    return [f"Other controls after training, by {_and(list(measures))}: SPD is {', '.join(parts)}."] if parts else []


def _side_effects(table: pd.DataFrame, source: str) -> list[str]:
    """What the trained model got worse at, on texts that it was not meant to change."""
    rows = _of_focus(table, source, "trained", BASE, "side effect")
    worse = [row for row in rows if better(row["measure"], row["verdict"]) == "worse"]
    few = [row for row in rows if row["verdict"] == TOO_FEW]
    listed = "; ".join(f"{row['measure']} on {row['target']} ({_number(row)})" for row in worse)
    said = [f"Side effects, worse than the base model: {listed}."] if worse else []
    if few:
        said.append(
            f"Side effects: {len(few)} of {len(rows)} measures have too few texts to show anything after correction; "
            "their intervals alone are in the tables."
        )
    elif rows and not worse:
        said.append("Side effects: nothing that was measured got worse beyond noise.")
    return said


def _losses(table: pd.DataFrame, source: str, phase: str, reference: str) -> Rows:
    """SPD's differences to one reference in the loss that decides, by target: on results where there are any."""
    aligned, results = (_rows(table, source, phase, measure, reference) for measure in (LOSS, RESULTS))
    return {**aligned, **results}


def _rows(table: pd.DataFrame, source: str, phase: str, measure: str, reference: str) -> Rows:
    """SPD's differences to one reference, by target."""
    own = _of_focus(table, source, phase, reference, "target")
    return {row["target"]: row for row in own if row["measure"] == measure}


def _of_focus(table: pd.DataFrame, source: str, phase: str, reference: str, role: str) -> list[dict[str, Any]]:
    place = {"source": source, "phase": phase, "reference": reference, "role": role, "method": FOCUS}
    return table[(table[list(place)] == pd.Series(place)).all(axis=1)].to_dict("records")


def _states(rows: Rows, wanted: str) -> list[str]:
    return [target for target, row in rows.items() if better(row["measure"], row["verdict"]) == wanted]


def _listed(rows: Rows, measure: str) -> str:
    """`aligned loss lower on svamp (-0.03 [-0.05, -0.01], p = 0.004), within noise on gsm8k (...)`."""
    if not rows:
        return f"{measure} was not measured"
    parts: dict[str, list[str]] = {}
    for target, row in rows.items():
        parts.setdefault(row["measure"], []).append(f"{row['verdict']} on {target} ({_number(row)})")
    return "; ".join(f"{measure} {', '.join(own)}" for measure, own in parts.items())


def _number(row: Mapping[str, Any]) -> str:
    return f"{estimate_of(row).interval}, corrected p = {row['p_holm']:.2g}"


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
