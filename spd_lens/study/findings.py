"""What a study's stored results say of every subspace and adapter in it, as findings; and the adapters' cards."""

from __future__ import annotations

from spd_lens import methods
from spd_lens.models import Fingerprint, adapter_digest
from spd_lens.output import visible
from spd_lens.runs import contrasts, stored, write_card
from spd_lens.stats import BASE, RANDOM, Finding, corrected
from spd_lens.study.folder import Study
from spd_lens.subspaces import write_findings


def study_findings(study: Study) -> list[Finding]:
    """Findings of every cell that has results: against the base, and against random directions with the same seed."""
    config = study.config
    model = Fingerprint.from_dict(study.notes["fingerprint"]).digest()
    controls = [name for name in config.trained if name.startswith("spd-random")]
    found: list[Finding] = []
    for cell in study.cells(config):
        if methods.get(cell.method).is_control or not cell.is_trained:
            continue
        about = {"method": cell.method, "model": visible(config.shared.model), "fingerprint": model, "seed": cell.seed}
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
