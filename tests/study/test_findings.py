"""Findings of a stored study: one for each seed, against the base and against random directions of the same seed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from statistics import fmean

import pytest

from spd_lens.models import adapter_digest
from spd_lens.study import Evidence, Report, Study, grades_of
from spd_lens.study.findings import study_findings, write_evidence

STORED = Path(__file__).parents[1] / "fixtures/artefacts"
TASK = "synthetic-math"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A copy of a study of two seeds that an earlier version made."""
    return Study(shutil.copytree(STORED / "study", tmp_path / "study"))


def test_every_seed_has_findings_of_its_own(study: Study) -> None:
    found = study_findings(study)
    assert {f.method for f in found} == {f"spd on {TASK}, own span, aligned loss, rank 0.5, layers [1]"}
    for seed in (1, 2):
        cell, control = study.cell(TASK, "spd", seed), study.cell(TASK, "spd-random", seed)
        for kind, phase in (("adapter", "trained"), ("subspace", "projected")):
            [one] = [
                f for f in found
                if (f.kind, f.seed, f.against, f.outcome) == (kind, seed, "random", "aligned_loss")
            ]  # fmt: skip
            mine, theirs = (
                [item["aligned_loss"] for item in json.loads(c.effects_path(TASK).read_text())[phase]]
                for c in (cell, control)
            )
            assert one.difference.value == pytest.approx(fmean(mine) - fmean(theirs), abs=1e-12)
            assert one.digest == (adapter_digest(cell.adapter) if kind == "adapter" else cell.subspace.digest())
            places = {c.effects_path(TASK).relative_to(study.path).as_posix() for c in (cell, control)}
            assert set(one.sources) == places
    base = [f for f in found if f.against == "base" and f.kind == "subspace" and f.outcome == "aligned_loss"]
    assert len(base) == 2
    assert all(any(name.startswith("base/") for name in f.sources) for f in base)


def test_the_report_and_the_artefacts_say_the_same(study: Study) -> None:
    write_evidence(study)
    cell = study.cell(TASK, "spd", 1)
    assert {f.seed for f in cell.subspace.findings} == {1, 2}
    text = Report(Evidence.read(study.path)).text
    assert re.search(rf"\| `spd on {TASK}, [^|]*` \| subspace \| {cell.subspace.grade} \|", text)
    assert f"Evidence: **{cell.subspace.grade}**" in (cell.adapter / "README.md").read_text()


def test_a_study_in_which_nothing_is_measured_has_no_findings(study: Study, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(study.path / Study.settings_file, begun)
    assert grades_of([begun]) == {}


def test_grades_of_several_places(study: Study, tmp_path: Path) -> None:
    run = Path(shutil.copytree(STORED / "run", tmp_path / "run"))
    found = grades_of([run, study.path])
    assert {run / "adapter", run / "subspace.safetensors", study.cell(TASK, "spd", 2).adapter} <= set(found)
    assert (run / "findings.json").is_file()
