"""The base model of a study beside what is published of it."""

from __future__ import annotations

from spd_lens.evaluation import LOSS_TASKS, Format, Measured, Subject, published, warning
from spd_lens.protocols import protocol
from spd_lens.runs import result_name
from spd_lens.stats import clustered_mean
from spd_lens.study.config import BASE
from spd_lens.study.reporting.differences import N_RESAMPLES
from spd_lens.study.reporting.evidence import Evidence, Outcome


def base_and_published(evidence: Evidence) -> str:
    """A table for every target on which something is published of the base model (Markdown); empty where nothing is."""
    subject = subject_of(evidence)
    if subject is None:
        return ""
    parts = ["\n".join(subject.beside(task, measured)) for task, measured in measured_base(evidence).items()]
    return "\n\n".join(part for part in (*parts, subject.caveat) if part) if any(parts) else ""


def base_warnings(evidence: Evidence) -> list[str]:
    """A sentence for every target on which the base is far below what is published of it."""
    subject = subject_of(evidence)
    if subject is None:
        return []
    found = ((task, warning(published(subject.name, task), m)) for task, m in measured_base(evidence).items())
    return [f"{task}: {text}" for task, text in found if text is not None]


def subject_of(evidence: Evidence) -> Subject | None:
    """The published model that a study is of; None where nothing is known of it."""
    settings = evidence.plan.get("settings") or {}
    model = settings.get("model")  # a study's file has all settings; tables without one are of nobody
    noted = evidence.facts.get("published_name")
    return None if model is None else Subject.of(str(model), settings.get("published_name"), noted)


def measured_base(evidence: Evidence) -> dict[str, Measured]:
    """What was measured of the base on each target, by the task's name as it stands in the settings."""
    plan, resolved = evidence.plan, evidence.facts.get("resolved") or {}
    settings = plan.get("settings") or {}
    named = {result_name(str(name)): str(name) for name in plan.get("targets") or []}
    asked = resolved.get("format") or settings.get("prompt_format")
    chosen = protocol(settings.get("protocol") or "paper")
    found = {}
    for target in evidence.targets:
        task = named.get(target, target)
        measure = "completion loss" if task in LOSS_TASKS else "accuracy"
        scores = evidence.scores(Outcome("", target, "target", "", BASE, measure))
        if scores is not None and scores.size:
            own = (plan.get("task_options") or {}).get(task) or {}
            here = Format.here(None if asked == "auto" else asked, {**chosen.options(task), **own})
            found[task] = Measured(clustered_mean(scores.to_numpy(), n_resamples=N_RESAMPLES), here)
    return found
