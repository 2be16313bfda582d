"""Findings of a stored run follow from its files: values, damage, sources; and they are read back as a grade."""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from spd_lens.files import read_json, write_json
from spd_lens.models import adapter_digest
from spd_lens.runs import Run, contrasts, run_findings, stored, write_evidence
from spd_lens.runs.summary import write_summary
from spd_lens.subspaces import adapter_grade, read_findings

STORED = Path(__file__).parents[1] / "fixtures/artefacts/run"
TASK = "synthetic-math"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A copy of a run of six items that an earlier version made."""
    return Run(shutil.copytree(STORED, tmp_path / "run"))


def raw(run: Run) -> dict[str, list[dict[str, Any]]]:
    """The file of effects as it is."""
    found: dict[str, list[dict[str, Any]]] = read_json(run.path / f"effects/{TASK}.json")
    return found


def rewrite(run: Run, change: Any) -> None:
    """Change every item of the file of effects by `change(policy, number, item)`."""
    effects = raw(run)
    for policy, items in effects.items():
        for number, item in enumerate(items):
            item.update(change(policy, number, item))
    write_json(run.path / f"effects/{TASK}.json", effects)


def test_findings_are_differences_of_what_is_stored(run: Run) -> None:
    effects, found = raw(run), {(f.kind, f.against, f.outcome): f for f in run_findings(run)}
    random = [name for name in effects if name.startswith("random")]
    assert random
    for kind, against, sides in (
        ("subspace", "base", ("projected", ["base"])), ("subspace", "random", ("projected", random)),
        ("adapter", "base", ("spd", ["base"])),
    ):  # fmt: skip
        mine, others = sides
        finding = found[kind, against, "aligned_loss"]
        means = [fmean(item["aligned_loss"] for item in effects[name]) for name in (mine, *others)]
        assert finding.difference.value == pytest.approx(means[0] - fmean(means[1:]), abs=1e-12)
        assert finding.kl == pytest.approx(fmean(item["kl"] for item in effects[mine]), abs=1e-12)
        wanted = fmean(item["kl"] for name in others for item in effects[name])
        assert finding.kl_against == pytest.approx(wanted, abs=1e-12)
        sha256 = hashlib.sha256((run.path / f"effects/{TASK}.json").read_bytes()).hexdigest()
        assert finding.sources == {f"effects/{TASK}.json": sha256}
        assert (finding.task, finding.data, finding.seed, finding.difference.n) == (TASK, "held-out", 42, 6)
    digests = {kind: finding.digest for (kind, *_), finding in found.items()}
    assert digests == {"subspace": run.subspace.digest(), "adapter": adapter_digest(run.adapter)}


def test_what_has_an_infinite_value_has_no_finding(run: Run) -> None:
    rewrite(run, lambda policy, n, _: {"aligned_loss": math.inf} if policy == "projected" and n == 0 else {})
    found = {(f.kind, f.against, f.outcome) for f in run_findings(run)}
    assert ("subspace", "base", "aligned_loss") not in found
    assert {("subspace", "base", "completion_loss"), ("adapter", "base", "aligned_loss")} <= found


def test_an_item_that_cannot_be_judged_is_no_finding(run: Run) -> None:
    path = run.path / f"eval/{TASK}/spd.json"
    record = read_json(path)
    record["items"][0]["judged"] = False
    write_json(path, record)
    found = stored(run, TASK, ["spd"])["accuracy"].by_item
    assert set(found) == {item["id"] for item in record["items"][1:]}


def test_a_card_that_a_user_wrote_is_left_alone(run: Run) -> None:
    card = run.adapter / "README.md"
    card.write_text("# My adapter\n")
    write_evidence(run)
    assert card.read_text() == "# My adapter\n"
    card.unlink()
    write_evidence(run)
    assert "Evidence: **" in card.read_text()


def test_accuracy_is_of_the_scored_completions(run: Run) -> None:
    [found] = [f for f in run_findings(run) if (f.kind, f.outcome) == ("adapter", "accuracy")]
    scores = {
        name: [item["score"] for item in read_json(run.path / f"eval/{TASK}/{name}.json")["items"]]
        for name in ("base", "spd")
    }
    assert found.difference.value == pytest.approx(fmean(scores["spd"]) - fmean(scores["base"]), abs=1e-12)
    assert set(found.sources) == {f"eval/{TASK}/{name}.json" for name in ("base", "spd")}


def test_later_outcomes_are_taken_where_they_are_stored(run: Run) -> None:
    """Items without a value are left out on both sides."""
    mine = stored(run, TASK, ["projected"])
    item = run.effects(TASK)["projected"][0]
    values = {f"item-{i}": float(i) for i in range(6)}
    mine["results_loss"] = mine["aligned_loss"]._replace(by_item=values)
    theirs = {"results_loss": mine["aligned_loss"]._replace(by_item={**values, "item-9": 5.0, "item-3": 9.0})}
    about = {key: value for key, value in vars(run_findings(run)[0]).items() if key in (
        "kind", "digest", "method", "task", "against", "model", "fingerprint", "seed"
    )}  # fmt: skip
    [found] = contrasts(mine, theirs, run.path, **about)
    assert (found.outcome, found.difference.n) == ("results_loss", 6)
    assert found.difference.value == pytest.approx(-1.0)
    assert item.id in mine["aligned_loss"].by_item


def planted(policy: str, number: int, item: dict[str, Any]) -> dict[str, Any]:
    """Each policy's loss and KL in little noise; the projection lowers the loss, and does as much damage as random."""
    loss = {"base": 1.0, "projected": 0.5, "spd": 0.8}.get(policy, 0.9)
    return {"aligned_loss": loss + 0.01 * number * (len(policy) % 3), "kl": 0.0 if policy == "base" else 0.1}


def many(run: Run) -> None:
    """The same items several times over, so that there are enough of them."""
    effects = raw(run)
    rows = {p: [{**item, "id": f"{item['id']}-{i}"} for i in range(4) for item in own] for p, own in effects.items()}
    write_json(run.path / f"effects/{TASK}.json", rows)


def test_the_grade_of_a_run_follows_from_its_files(run: Run) -> None:
    many(run)
    rewrite(run, planted)
    write_evidence(run)
    assert str(run.subspace.grade) == "beats random at equal damage"
    assert str(adapter_grade(run.adapter)) == "held out"
    text = write_summary(run)
    assert "- The subspace: **beats random at equal damage**. `aligned_loss on synthetic-math (held-out)" in text
    assert "Evidence: **held out**" in (run.adapter / "README.md").read_text()
    rewrite(run, lambda policy, *_: {"kl": 0.15} if policy == "projected" else {})
    assert str(run.subspace.grade) == "none"  # measured anew, and not computed anew
    write_evidence(run)
    assert str(run.subspace.grade) == "held out"


def test_findings_that_are_the_same_are_not_written_again(run: Run) -> None:
    write_evidence(run)
    files = [run.path / "findings.json", run.adapter / "README.md"]
    times = [file.stat().st_mtime_ns for file in files]
    write_evidence(run)
    assert [file.stat().st_mtime_ns for file in files] == times
    assert read_findings(run.path) == tuple(run_findings(run))
