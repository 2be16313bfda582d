"""`findings.json`: what was measured with the subspaces and adapters of a folder, kept beside them.

Beside and not in them: an artefact that a corpus was generated with is never written again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from spd_lens.errors import SPDError
from spd_lens.files import file_sha256, read_json, signed, update_text
from spd_lens.models import adapter_digest
from spd_lens.stats import Finding, Grade, grade

log = logging.getLogger(__name__)

FINDINGS = "findings.json"
_KIND = "findings of spd_lens"
_FOLDERS = 4
"""How far above an artefact its findings may lie: a study keeps one file for all `SOURCE/METHOD/SEED`."""


def write_findings(folder: str | Path, findings: Iterable[Finding]) -> Path:
    """Write `findings.json` into a folder, whole or not at all, unless it says the same already."""
    record = {"kind": _KIND, "findings": [finding.to_dict() for finding in findings]}
    return update_text(Path(folder) / FINDINGS, signed(record))


def read_findings(path: str | Path) -> tuple[Finding, ...]:
    """What `write_findings` wrote, from the file or its folder, without findings whose stored results have changed.

    Raises:
        SPDError: the file is missing, or holds something else.
    """
    path = Path(path) / FINDINGS if Path(path).is_dir() else Path(path)
    record = read_json(path)
    if not isinstance(record, dict) or record.get("kind") != _KIND or not isinstance(record.get("findings"), list):
        raise SPDError(f"{path} does not hold findings of spd_lens; give the file that a run or a study wrote")
    try:
        return tuple(still_stored(map(Finding.from_dict, record["findings"]), path.parent))
    except SPDError as error:
        raise SPDError(f"{path}: {error}") from error


def beside(artefact: str | Path) -> tuple[Finding, ...]:
    """Findings that lie nearest to a subspace's file or an adapter's directory, in its folder or above; else none.

    Of something else that has the name of the file, or is damaged, there are none, and the log says so.
    """
    for folder in list(Path(artefact).absolute().parents)[:_FOLDERS]:
        if (folder / FINDINGS).is_file():
            try:
                return read_findings(folder)
            except SPDError as error:
                log.warning("no evidence: %s", error)
                return ()
    return ()


def adapter_grade(adapter: str | Path) -> Grade:
    """The grade of an adapter's or checkpoint's directory, by the findings beside it (docs/evidence.md)."""
    return grade(beside(adapter), adapter_digest(adapter))


def still_stored(findings: Iterable[Finding], folder: Path) -> Iterator[Finding]:
    """Findings whose stored results are what they were, as far as they are at hand in the folder."""
    digests: dict[Path, str | None] = {}
    for finding in findings:
        places = {folder / name: sha256 for name, sha256 in finding.sources.items()}
        for place in places.keys() - digests.keys():
            digests[place] = file_sha256(place) if place.is_file() else None
        if changed := [place for place, sha256 in places.items() if digests[place] not in (None, sha256)]:
            log.warning("no evidence: %s is not what %s was computed from", changed[0], finding.question[2])
        else:
            yield finding
