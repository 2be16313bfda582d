"""`Subject`: a run directory as analyses see it."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from spd_lens.analysis.common.style import figure
from spd_lens.analysis.common.subject import Subject, place, subjects
from spd_lens.errors import SPDError
from spd_lens.files import write_text
from spd_lens.models.pair import ModelPair
from spd_lens.runs.run_dir import Run
from spd_lens.sites import Site


@pytest.fixture
def copied(finished_run: Run, tmp_path: Path) -> Callable[[str], Path]:
    def _copied(name: str) -> Path:
        return Path(shutil.copytree(finished_run.path, tmp_path / name))

    return _copied


def test_data_and_artefacts_are_the_runs(copied: Callable[[str], Path], tiny_pair: ModelPair) -> None:
    subject = Subject(copied("mine"), pair=tiny_pair, progress=False)
    assert subject.name == "mine" and subject.folder == subject.run.path / "analysis"
    examples = subject.calibration()
    assert len(examples) == subject.run.config.n_calibration == 6
    assert [e.id for e in subject.calibration(3)] == [e.id for e in subject.task.calibration(3, 42)]
    held_out = subject.held_out(4)
    assert len(held_out) == 4 and not {e.id for e in held_out} & {e.id for e in examples}
    assert [e.id for e in subject.held_out(4, "synthetic-math")] == [e.id for e in held_out]
    assert subject.subspace.sites == subject.moments.sites
    assert subject.pair is tiny_pair


def test_moments_everywhere_are_extracted_once_and_hold_the_runs_own(
    copied: Callable[[str], Path], tiny_pair: ModelPair
) -> None:
    subject = Subject(copied("mine"), pair=tiny_pair, progress=False)
    moments = subject.moments_everywhere()
    assert {site.layer for site in moments.sites} == {0, 1, 2, 3}
    for site in subject.moments.sites:
        torch.testing.assert_close(moments.gradient[site], subject.moments.gradient[site], rtol=1e-4, atol=1e-12)
    again = Subject(subject.run.path, progress=False)  # would load the model if it had to extract
    assert again.moments_everywhere().sites == moments.sites and not again.experiment.models


def test_where_a_share_of_energy_was_kept_its_median_rank_stands_for_a_rank(
    copied: Callable[[str], Path], tiny_pair: ModelPair, caplog: pytest.LogCaptureFixture
) -> None:
    subject = Subject(copied("mine"), pair=tiny_pair, progress=False)
    assert subject.rank("") == subject.run.config.rank and not caplog.records
    subspace = subject.moments.subspace(energy=0.9)
    subspace.save(subject.run.subspace_path)
    changed = subject.run.config.model_copy(update={"energy": 0.9})
    write_text(subject.run.path / "config.yaml", changed.to_yaml())
    subject = Subject(subject.run.path, pair=tiny_pair, progress=False)
    assert subject.run.config.energy == 0.9
    ranks = [rank for site in subspace.sites for rank in subspace.ranks[site]]
    assert len(set(ranks)) > 1
    assert subject.rank("") == round(statistics.median(ranks))
    assert f"ranks of {min(ranks)} to {max(ranks)}" in caplog.text and "their median" in caplog.text
    assert subject.rank("3") == 3 and subject.rank("0.5") == 0.5


def test_another_models_weights_are_refused(copied: Callable[[str], Path], tiny_qwen2_pair: ModelPair) -> None:
    with pytest.raises(SPDError, match="no longer has the weights"):
        _ = Subject(copied("mine"), pair=tiny_qwen2_pair).pair


def test_runs_of_one_model_share_a_pair(copied: Callable[[str], Path]) -> None:
    one, two = subjects([copied("one"), copied("two")], progress=False)
    assert one.pair is two.pair


def test_names_must_differ_and_runs_exist(copied: Callable[[str], Path], tmp_path: Path) -> None:
    path = copied("same")
    other = shutil.copytree(path, tmp_path / "deeper" / "same")
    with pytest.raises(SPDError, match="are called 'same'"):
        subjects([path, other])
    with pytest.raises(SPDError, match="is not a run directory"):
        subjects([tmp_path / "nowhere"])


def test_saved_tables_come_back(copied: Callable[[str], Path]) -> None:
    subject = Subject(copied("mine"))
    assert subject.saved("thing") is None and subject.facts("thing") == {}
    frame = pd.DataFrame({"site": ["1.k", "1.v"], "value": [0.1, 1 / 3]})
    written = subject.save("thing", frame, [figure("t", "x", "y")], says="seen", seed=3)
    assert [path.name for path in written] == ["thing.csv", "thing.json", "thing.html"]
    pd.testing.assert_frame_equal(subject.saved("thing"), frame)
    facts = subject.facts("thing")
    assert facts["seed"] == 3 and facts["run"] == "mine" and facts["task"] == "synthetic-math"
    assert "thing of mine" in (subject.folder / "thing.html").read_text()
    assert len(subject.save("bare", frame)) == 2


def test_place() -> None:
    assert place(Site(3, "v"), 1, True) == {"site": "3.v", "layer": 3, "kind": "v", "head": "1"}
    assert place(Site(3, "v"), 0, False)["head"] == "all"


def test_facts_are_json_whatever_they_hold(copied: Callable[[str], Path]) -> None:
    subject = Subject(copied("mine"))
    subject.save("thing", pd.DataFrame({"value": [1.0]}), rank=0.5, runs=["a", "b"])
    assert json.loads((subject.folder / "thing.json").read_text())["runs"] == ["a", "b"]
    assert not math.isnan(subject.saved("thing").value.item())
