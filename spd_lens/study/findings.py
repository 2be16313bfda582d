"""What a study's stored results say of every subspace and adapter in it, as findings; and the adapters' cards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from spd_lens import methods
from spd_lens.models import Fingerprint, adapter_digest
from spd_lens.output import visible
from spd_lens.runs import Artefacts, Run, contrasts, made_by, stored, write_card
from spd_lens.runs import write_evidence as write_run_evidence
from spd_lens.stats import BASE, RANDOM, Finding, Grade, corrected, grade
from spd_lens.study.folder import Study
from spd_lens.subspaces import FINDINGS, Subspace, read_findings, write_findings


def grades_of(places: Iterable[str | Path]) -> dict[Path, Grade]:
    """The grade of every subspace and adapter in run directories and studies, whose findings are made anew, and of
    every subspace in a contest's folder, whose findings are those that it wrote.

    Findings of all places count together, so that those of other seeds and models are replications.
    """
    found: list[Finding] = []
    digests: dict[Path, str] = {}
    for place in map(Path, places):
        artefacts: list[Artefacts] = []
        if (place / Study.settings_file).exists():
            write_evidence(study := Study.open(place))
            artefacts += study.cells()
        elif not (place / Run.settings_file).exists() and (contests := _contests(place)):
            for folder in contests:
                found += read_findings(folder)
                made = {path: Subspace.load(path) for path in sorted((folder / "subspaces").glob("*.safetensors"))}
                digests |= {path: one.digest() for path, one in made.items() if "random" not in one.origin}
            continue
        else:
            write_run_evidence(run := Run.open(place))
            artefacts.append(run)
        found += read_findings(place)
        for one in artefacts:
            if one.has_subspace:
                digests[one.subspace_path] = one.subspace.digest()
            if one.is_trained:
                digests[one.adapter] = adapter_digest(one.adapter)
    return {path: grade(found, digest) for path, digest in digests.items()}


def _contests(place: Path) -> list[Path]:
    """The folder of one place of a contest, or those in the folder of its report."""
    there = [place, *sorted(place.glob("*"))]
    return [folder for folder in there if (folder / FINDINGS).is_file() and (folder / "subspaces").is_dir()]


def study_findings(study: Study) -> list[Finding]:
    """Findings of every cell that has results: against the base, and against random directions with the same seed."""
    config = study.config
    if "fingerprint" not in study.notes:
        return []  # begun, and nothing is measured
    model = Fingerprint.from_dict(study.notes["fingerprint"]).digest()
    controls = [name for name in config.trained if name.startswith("spd-random")]
    found: list[Finding] = []
    for cell in study.cells(config):
        if methods.get(cell.method).is_control or not cell.is_trained:
            continue
        method = made_by(cell.method, config.cell(cell.source, cell.seed or 0))
        about = {"method": method, "model": visible(config.shared.model), "fingerprint": model, "seed": cell.seed}
        under = cell.projection
        digests = {"adapter": adapter_digest(cell.adapter), **({"subspace": under[0]} if under else {})}
        for kind, digest in digests.items():
            phase = "trained" if kind == "adapter" else "projected"
            for task in config.shared.targets:
                mine = stored(cell, task, [phase])
                own = {**about, "task": visible(task), "kind": kind, "digest": digest}
                found += contrasts(mine, stored(study.base(), task, ["trained"]), study.path, against=BASE, **own)
                for control in controls:
                    other = stored(study.cell(cell.source, control, cell.seed or 0), task, [phase])
                    found += contrasts(mine, other, study.path, against=RANDOM, **own)
    return corrected(found)


def write_evidence(study: Study) -> None:
    """Write `findings.json` of a study, made anew from its stored results, and the card of every adapter."""
    write_findings(study.path, study_findings(study))
    for cell in study.cells():
        if cell.is_trained:
            write_card(cell.adapter, f"{cell.method} on {cell.source}", study.config.shared.model)
