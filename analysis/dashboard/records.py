"""What a run directory adds to the curves: outcomes of projecting, completions, saved analyses, provenance."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import plotly

from spd_lens.analysis import ANALYSES
from spd_lens.analysis.common import LOSS_FIELDS, Subject, Values, by_item, deciding, known, word_diff
from spd_lens.analysis.dashboard.sweeps import layer_sweep, rank_sweep
from spd_lens.errors import SPDError
from spd_lens.evaluation import NEUTRAL, OUTCOMES, ItemResult
from spd_lens.files import Schema, read_json
from spd_lens.generation import Record
from spd_lens.output import visible
from spd_lens.runs import Run, SPDConfig, environment
from spd_lens.stats import Estimate, difference_sentence, mean_interval, paired_difference
from spd_lens.subspaces import adapter_grade

log = logging.getLogger(__name__)

Table = list[tuple[str, str]]
Link = Callable[[Subject, Path], str]
"""Makes a link of a run and a page in its `analysis/` folder."""


def of_run(subject: Subject, *, link: Link | None, texts: int) -> dict[str, Any]:
    """Everything about one run that is not a curve. An unfinished run has less of it, never an error."""
    run, config = subject.run, subject.run.config
    grades = {"subspace": subject.subspace.grade}
    if run.is_trained:
        grades["adapter"] = adapter_grade(run.adapter)
    reasons = [(name, visible("; ".join([str(grade), *grade.reasons]))) for name, grade in grades.items()]
    return {
        "task": visible(Path(config.task).stem),
        "model": visible(config.model.rsplit("/", 1)[-1]),
        "effects": [effects(run, task) for task in config.targets if run.effects_path(task).exists()]
        + ([effects(run, NEUTRAL, side=True)] if run.effects_path(NEUTRAL, side=True).exists() else []),
        "rank_sweep": rank_sweep(subject),
        "layer_sweep": layer_sweep(subject),
        "texts": list(_text_sets(run, texts)),
        "saved": saved(subject, link),
        "evidence": "evidence: " + ", ".join(f"{name} {grade}" for name, grade in grades.items()),
        "provenance": [{"title": "Evidence", "rows": reasons}, *provenance(run)],
    }


def effects(run: Run, task: str, *, side: bool = False) -> dict[str, Any]:
    """Every outcome that the items have: losses as changes from base, KL as it is; in nats, 95 % intervals by item.

    `random` are the control subspaces of the same ranks: their mean per item, and each for itself in `each`. `side`:
    not of a task but of texts that no run aims at, whose losses are all one.
    """
    measured = ("completion_loss", "kl") if side else (*LOSS_FIELDS, "kl")
    found = {name: by_item(items, measured) for name, items in run.effects(task, side=side).items()}
    base = found.pop("base")
    fields = [field for field in base if all(field in values for values in found.values())]
    changes = {
        name: {field: known(values[field] - (0.0 if field == "kl" else base[field]), base[field]) for field in fields}
        for name, values in found.items()
    }
    controls = [name for name in changes if name.startswith("random-")]
    groups: dict[str, Values] = {name: changes[name] for name in ("projected", "spd") if name in changes}
    if controls:
        groups["random"] = {field: np.mean([changes[name][field] for name in controls], axis=0) for field in fields}
    shown: dict[str, Any] = {"task": "other text" if side else visible(task), "fields": fields}
    shown["decides"] = "completion_loss" if side else deciding(fields)
    for name, group in groups.items():
        shown[name] = {field: interval(mean_interval(values)) for field, values in group.items()}
    if controls:
        shown["each"] = {field: [fmean(changes[name][field]) for name in controls] for field in fields}
        shown["says"] = {
            field: difference_sentence(
                paired_difference(groups["random"][field], groups["projected"][field]),
                measure=OUTCOMES[field][0].upper() + OUTCOMES[field][1:], first="random", second="projected",
            )
            for field in fields
            if "projected" in groups
        }  # fmt: skip
    return shown


def interval(estimate: Estimate) -> list[float | None]:
    """`[value, low, high]`, with None for an end that is not known."""
    return [end if abs(end) < float("inf") else None for end in (estimate.value, estimate.low, estimate.high)]


def _text_sets(run: Run, limit: int) -> Iterator[dict[str, Any]]:
    """Sets of completions to read side by side: training prompts, then the test items of each task."""
    with contextlib.suppress(SPDError):  # the run has not come that far
        corpora = {"base": run.unprojected, "projected": run.corpus}
        by_key = {policy: {record.key: record for record in corpus} for policy, corpus in corpora.items()}
        yield _text_set("training prompts, sampled with the same noise", by_key, limit)
    for task in run.config.targets:
        by_id = {}
        for policy in ("base", "projected", "spd"):
            with contextlib.suppress(SPDError):
                result = run.result(task, policy)
                by_id[result.policy] = {item.id: item for item in result.items}
        if by_id:
            yield _text_set(f"{task}: test items, greedy", by_id, limit)


def _text_set(title: str, texts: Mapping[str, Mapping[Any, Record | ItemResult]], limit: int) -> dict[str, Any]:
    """What several policies answered to the same prompts, in the order of the first."""
    first, *others = texts.values()
    shared = [key for key in first if all(key in other for other in others)]
    items = [_item({policy: own[key] for policy, own in texts.items()}) for key in shared[:limit]]
    return {"title": visible(title), "columns": list(texts), "total": len(shared), "items": items}


def _item(answers: Mapping[str, Record | ItemResult]) -> dict[str, Any]:
    """One prompt's completions; all but the first as differences from the first."""
    safe = {policy: visible(answer.completion) for policy, answer in answers.items()}
    first, *others = safe
    one = answers[first]
    pieces = {
        name: [[p.after] if p.same and p.before == p.after else [p.before, p.after, int(p.same)] for p in diff]
        for name in others
        for diff in [word_diff(safe[first], safe[name])]
    }
    ends = {policy: answer.finish_reason for policy, answer in answers.items()}
    shown = {"id": visible(one.id), "prompt": visible(one.prompt), "text": safe[first], "pieces": pieces, "ends": ends}
    scores = {policy: round(answer.score, 3) for policy, answer in answers.items() if isinstance(answer, ItemResult)}
    if isinstance(one, ItemResult):
        shown |= {"gold": visible(one.gold), "scores": scores}
    return shown


def saved(subject: Subject, link: Link | None) -> list[dict[str, Any]]:
    """Tables and pages in the run's `analysis/` folder: name, question, first rows, and where its page lies."""
    found = []
    for name in sorted({path.stem for ending in ("csv", "html") for path in subject.folder.glob(f"*.{ending}")}):
        page = subject.folder / f"{name}.html"
        questions = (found.question for known, found in ANALYSES.items() if name.startswith(known))
        entry: dict[str, Any] = {"name": visible(name), "question": next(questions, "")}
        entry["href"] = link(subject, page) if link is not None and page.exists() else None
        try:
            frame = subject.saved(name)
        except SPDError as error:  # of an earlier version, in which an analysis was killed while it wrote the file
            log.warning("not shown: %s", error)
            continue
        if frame is not None:
            entry |= {"rows": len(frame), "columns": [visible(str(column)) for column in frame.columns]}
            entry["head"] = frame.head(6).map(_cell).to_numpy().tolist()
        found.append(entry)
    return found


def relative_to(out: Path) -> Link:
    """Links that work where the page at `out` and the run directories stay where they are."""
    return lambda _, page: Path(os.path.relpath(page.resolve(), out.resolve().parent)).as_posix()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    text = visible(str(value))
    return text if len(text) <= 60 else f"{text[:59]}…"


def provenance(run: Run) -> list[dict[str, Any]]:
    """Named tables of what made the run: proofs, times, settings, versions, model, data."""
    config, notes = run.config, run.notes
    tables: dict[str, Table] = {"What was proved": _proofs(notes), "Seconds per stage": _seconds(notes)}
    settings, defaults = config.model_dump(mode="json"), SPDConfig.make({}).model_dump(mode="json")
    tables["Settings that are not the default"] = _rows({k: v for k, v in settings.items() if v != defaults[k]})
    tables["All settings"] = _rows(settings)
    tables["As it was resolved"] = _rows(_flat(notes.get("resolved", {})))
    tables["Versions and machine"] = _rows({**notes.get("versions", {}), **notes.get("machine", {})})
    for number, later in enumerate(notes.get("continued_with", []), start=1):
        tables[f"Continued with ({number})"] = _rows(_flat(later))
    shape = {k: v for k, v in notes.get("fingerprint", {}).items() if k != "sample"}
    tables["Model"] = _rows({"name": config.model, "weights, digest": notes.get("weights", "unknown"), **shape})
    tables["Data"] = _data(run)
    page = {"plotly": plotly.__version__, "spd-lens": environment()["versions"]["spd-lens"]}
    tables["This page"] = _rows(page)
    return [{"title": title, "rows": rows} for title, rows in tables.items() if rows]


def _proofs(notes: Mapping[str, Any]) -> Table:
    hooks = notes.get("hooks")
    if hooks is None:
        return [("hooks", "no lens model was built; the projection was folded into the twin's weights")]
    firings = ", ".join(f"{site}: {n}" for site, n in hooks["firings"].items())
    parity = hooks["fold_parity"]
    return [
        ("hook firings in one forward pass of the lens model", firings),
        ("folded weights against hooks, KL in nats", f"{parity['kl']:.2g}"),
        ("folded weights against hooks, logits in units of their spread", f"{parity['logits']:.2g}"),
    ]


def _seconds(notes: Mapping[str, Any]) -> Table:
    seconds = notes.get("seconds", {})
    rows = [(visible(stage), f"{value:.1f}") for stage, value in seconds.items()]
    return [*rows, ("total", f"{sum(seconds.values()):.1f}")] if rows else []


class _Card(Schema, extra="ignore"):
    """What the page shows of a task's data card."""

    counts: dict[str, int] | str | None = None
    sources: dict[str, str] = {}


def _data(run: Run) -> Table:
    rows: Table = []
    path = run.path / "data_card.json"
    for task, card in (read_json(path, dict[str, _Card]) if path.exists() else {}).items():
        counts = card.counts  # a task that generates its items has as many as one asks for
        shown = ", ".join(f"{n} {split}" for split, n in counts.items()) if isinstance(counts, dict) else str(counts)
        rows.append((visible(task), visible(shown)))
        rows += [(visible(f"{name}, sha256"), str(digest)[:16]) for name, digest in card.sources.items()]
    return rows


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with those that are nested on the same level."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {key: value} if not isinstance(value, Mapping) else _flat(value)
    return flat


def _rows(values: Mapping[str, Any]) -> Table:
    def text(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(str, value)) or "none"
        return "not set" if value is None else str(value)

    return [(visible(str(key)), visible(text(value))) for key, value in values.items()]
