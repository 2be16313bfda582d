"""What stored results say of the subspace and the adapter of a run or a cell, as findings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from spd_lens.evaluation import EvalResult
from spd_lens.files import file_sha256, update_text
from spd_lens.models import adapter_digest
from spd_lens.output import visible
from spd_lens.runs.artefacts import Artefacts
from spd_lens.runs.config import SPDConfig, result_name
from spd_lens.runs.run_dir import Run
from spd_lens.stats import BASE, GOOD, HELD_OUT, RANDOM, Finding, corrected
from spd_lens.subspaces import adapter_grade, write_findings

_NOT_A_USERS = ("tags: [spd-lens]", "[More Information Needed]")
"""What stands in a card of this module's, and in PEFT's empty one: another is somebody's own, and is left alone."""


class Stored(NamedTuple):
    """One outcome of a policy, or of several that are averaged, on the items of a task."""

    by_item: Mapping[str, float]
    file: Path


def stored(there: Artefacts, task: str, policies: Iterable[str]) -> dict[str, Stored]:
    """What the files hold of some policies on held-out items: the outcomes of `GOOD`, and `kl`; empty if nothing."""
    policies, found = list(policies), {}
    if policies and (path := there.effects_path(task)).exists():
        effects = there.effects(task)
        items = [item for policy in policies for item in effects.get(policy, ())]
        for outcome in (*GOOD, "kl"):
            values: dict[str, list[float]] = {}
            for item in items:
                if (value := getattr(item, outcome, None)) is not None:
                    values.setdefault(item.id, []).append(value)
            if values:
                found[outcome] = Stored({id: fmean(of_item) for id, of_item in values.items()}, path)
    if len(policies) == 1 and (path := there.result_path(task, policies[0])).exists():
        found["accuracy"] = Stored({item.id: item.score for item in EvalResult.load(path).items if item.judged}, path)
    return found


def contrasts(
    mine: Mapping[str, Stored], theirs: Mapping[str, Stored], folder: Path, **about: Any
) -> Iterator[Finding]:
    """One finding for each outcome that both sides have on the same items; `about` are the other fields."""
    kls = [fmean(side["kl"].by_item.values()) if "kl" in side else math.nan for side in (mine, theirs)]
    kl, kl_against = (value if math.isfinite(value) else None for value in kls)
    for outcome in (name for name in GOOD if name in mine and name in theirs):
        own, other = mine[outcome], theirs[outcome]
        if shared := [id for id in own.by_item if id in other.by_item]:
            before, after = ([side.by_item[id] for id in shared] for side in (other, own))
            if not all(map(math.isfinite, (*before, *after))):
                continue  # a policy that breaks the model on an item has no mean; leaving the item out would flatter it
            sources = {side.file.relative_to(folder).as_posix(): file_sha256(side.file) for side in (own, other)}
            yield Finding.paired(
                before, after, outcome=outcome, data=HELD_OUT, kl=kl, kl_against=kl_against, sources=sources, **about
            )


def made_by(name: str, config: SPDConfig) -> str:
    """A method with the settings that decide which directions it keeps: findings with other ones replicate nothing."""
    size = f"rank {config.rank}" if config.energy is None else f"energy {config.energy:g}"
    return visible(
        f"{name} on {result_name(config.task)}, {config.span or 'own'} span, {config.loss} loss, {size}, "
        f"layers {config.layers}"
    )


def run_findings(run: Run) -> list[Finding]:
    """Findings of a run: its subspace against the base and random subspaces, its adapter against the base."""
    config, subspace = run.config, run.subspace
    assert subspace.fingerprint is not None  # it was extracted from the run's model
    estimator = subspace.origin.get("estimator", "paper")
    name = "spd" if estimator == "paper" else f"spd-{estimator}"
    about = {
        "method": made_by(name, config), "model": visible(config.model),
        "fingerprint": subspace.fingerprint.digest(), "seed": config.seed,
    }  # fmt: skip
    digests = {"subspace": subspace.digest(), "adapter": adapter_digest(run.adapter)}
    found: list[Finding] = []
    for task in config.targets:
        base, projected, spd = (stored(run, task, [name]) for name in ("base", "projected", "spd"))
        random = stored(run, task, [f"random-{i}" for i in range(config.n_random)])
        for kind, mine, against, theirs in (
            ("subspace", projected, BASE, base), ("subspace", projected, RANDOM, random), ("adapter", spd, BASE, base),
        ):  # fmt: skip
            own = {"task": visible(task), "kind": kind, "digest": digests[kind], "against": against}
            found += contrasts(mine, theirs, run.path, **about, **own)
    return corrected(found)


def write_evidence(run: Run) -> None:
    """Write `findings.json` of a run, made anew from its stored results, and the card of its adapter."""
    write_findings(run.path, run_findings(run))
    write_card(run.adapter, f"SPD on {run.config.task}", run.config.model)


def write_card(adapter: Path, title: str, model: str) -> None:
    """Write the adapter's card, `README.md` in its directory, with the evidence that there is for it."""
    grade = adapter_grade(adapter)
    lines = ["---", f"base_model: {json.dumps(visible(model))}", "tags: [spd-lens]", "---", "", f"# {visible(title)}"]
    lines += ["", f"Evidence: **{grade}**, computed from the stored results in `findings.json`.", ""]
    card = adapter / "README.md"
    if card.exists() and not any(mark in card.read_text(encoding="utf-8") for mark in _NOT_A_USERS):
        return
    update_text(card, "\n".join([*lines, *(f"- {reason}" for reason in grade.reasons)]) + "\n")
