"""Analyses of a run project subspaces of its own estimator, at any rank and layer, or of one that is named."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from spd_lens import estimators
from spd_lens.analysis.common import Subject
from spd_lens.analysis.dashboard.playground import Ask, Playground
from spd_lens.analysis.directions.command import main as directions
from spd_lens.analysis.heads.ablation import head_effects
from spd_lens.analysis.heads.command import main as heads
from spd_lens.analysis.overlap.command import main as overlap
from spd_lens.analysis.sweeps.grid import Grid
from spd_lens.analysis.sweeps.report import default_cell, report
from spd_lens.errors import SPDError
from spd_lens.evaluation import teacher_forced
from spd_lens.files import write_text
from spd_lens.runs import Experiment
from spd_lens.runs.run_dir import Run
from spd_lens.settings import Extraction
from spd_lens.sites import Site
from spd_lens.subspaces import Policy, extract

GRID = {"ranks": [1, 4], "layers": ["last_mid"], "n_items": 4, "n_random": 3}
SITES = [Site(0, "k"), Site(2, "v")]
"""Beside the run's own layers, 1 and 3."""


@pytest.fixture
def run_by(finished_run, tiny_pair, tmp_path):
    """A run by an estimator, as an analysis sees it."""

    def _run_by(name, estimator, **settings):
        path = shutil.copytree(finished_run.path, tmp_path / name)
        config = finished_run.config.model_copy(update={"estimator": estimator, **settings})
        write_text(path / "config.yaml", config.to_yaml())
        for kept in path.glob("moments*"):
            kept.unlink()
        experiment = Experiment.opened(Run(path), pair=tiny_pair, progress=False)
        experiment.moments(keep=experiment.kept)
        experiment.subspace().save(path / "subspace.safetensors")
        return Subject(path, pair=tiny_pair, progress=False)

    return _run_by


def without_sink(moments, site, head, rank):
    """Numpy's leading singular directions of one head, from all gradients less those of the first token."""
    rest = (moments.gradient[site] - moments.classes["sink"].gradient[site]).sum(0).numpy()
    basis = np.linalg.svd(rest[head * 8 : head * 8 + 8, head * 8 : head * 8 + 8])[0][:, :rank]
    return torch.tensor(basis @ basis.T)


def least_helpful(moments, site, head, rank):
    """Numpy's directions whose removal raises the loss most, to first order."""
    cross = moments.cross[site].sum(0).numpy()[head * 8 : head * 8 + 8, head * 8 : head * 8 + 8]
    basis = np.linalg.eigh(cross + cross.T)[1][:, :rank]
    return torch.tensor(basis @ basis.T)


@pytest.mark.parametrize(("name", "reference"), [("no-sink", without_sink), ("attribution", least_helpful)])
def test_any_rank_at_any_layer_is_the_estimators_own(run_by, tiny_pair, name, reference):
    subject = run_by("mine", name, span="results")
    estimated = subject.estimated(layers="all")
    examples = subject.task.spanned("results").calibration(6, subject.run.config.data_seed)
    moments = extract(tiny_pair, examples, layers="all", keep=["classes", "cross"], progress=False)
    found = estimated(3, SITES, per_head=True)
    assert found.sites == SITES and found.origin["estimator"] == name
    for site in SITES:
        for head in range(2):
            torch.testing.assert_close(
                found.projector(site)[head], reference(moments, site, head, 3), rtol=0, atol=1e-5
            )
    paper = subject.estimated("paper", layers="all")(3, SITES, per_head=True)
    assert not torch.allclose(paper.projector(SITES[1]), found.projector(SITES[1]), atol=1e-3)


def test_what_the_run_projected_is_taken_as_it_is(run_by):
    subject = run_by("mine", "attribution")
    own = subject.subspace.random_like(0)  # what no estimator makes
    own.save(subject.run.subspace_path)
    estimated = subject.estimated(layers="all")
    assert estimated(4, own.sites, per_head=True).digest() == own.digest()  # half of eight directions
    for other in ((own.sites[:1], True), (own.sites, False)):
        mine = estimated(4, other[0], per_head=other[1])
        assert mine.digest() != own.select(other[0]).digest() and mine.per_head == other[1]
    assert estimated(1, own.sites, per_head=True).ranks != estimated(1.0, own.sites, per_head=True).ranks
    assert subject.estimated("no-sink")(4, own.sites, per_head=True).origin["estimator"] == "no-sink"


def test_an_estimator_that_cannot_is_refused(run_by):
    subject = run_by("mine", "paper", center_gradients=True)
    with pytest.raises(SPDError, match="unknown estimator 'best'"):
        subject.estimated("best")
    with pytest.raises(SPDError, match="takes no center_gradients"):
        subject.estimated("attribution")


def test_a_sweep_is_of_the_runs_estimator_or_of_one_that_is_named(run_by, tiny_pair):
    subject = run_by("mine", "attribution")
    grid = Grid.make(GRID)
    report("rank_sweep", subject, grid, generate=False)
    report("rank_sweep", subject, grid, generate=False, estimator="no-sink")
    report("rank_sweep", subject, grid, generate=False)  # what is there is of the same estimator
    assert [subject.facts(name)["estimator"] for name in ("rank_sweep", "rank_sweep-no-sink")] == [
        "attribution", "no-sink",
    ]  # fmt: skip
    own, named = (
        subject.saved(name).set_index(["measure", "cell"]).value["kl"] for name in ("rank_sweep", "rank_sweep-no-sink")
    )
    cell = default_cell(subject, subject.moments_everywhere()).name
    for found, subspace in ((own, subject.subspace), (named, subject.experiment.subspace(estimator="no-sink"))):
        items = teacher_forced(tiny_pair, subject.held_out(4), [Policy("mine", subspace)], progress=False)["mine"]
        assert found[cell] == pytest.approx(np.mean([item.kl for item in items]), rel=1e-3)
    assert not np.allclose(own, named, rtol=1e-2)


def test_heads_and_directions_are_of_the_runs_estimator(run_by, tiny_pair, caplog):
    subject = run_by("mine", "attribution")
    heads([subject.run.path], layers="2", n=3, rank="2", shuffled=False, quiet=True)
    source = estimators.Calibration(tiny_pair, subject.calibration(), settings=Extraction(layers="all"))
    everywhere = estimators.get("attribution").subspace(source, estimators.Shape(2))
    chosen = everywhere.select([Site(2, "k"), Site(2, "v")])
    expected = head_effects(tiny_pair, subject.held_out(3), chosen, n_random=1, seed=0, progress=False)
    assert subject.saved("heads-effects").value.to_numpy() == pytest.approx(expected.value.to_numpy(), abs=1e-4)

    directions([subject.run.path], n=2, n_random=19, quiet=True)
    table = subject.saved("directions")
    assert table.singular_value.isna().all() and not table.value.isna().any()
    shares = table[table.measure == "energy share"].set_index(["site", "head", "direction"]).value
    for site in subject.subspace.sites:
        grams = subject.moments.blocks(site)
        for head, basis in enumerate(subject.subspace.blocks(site)):  # the leading two of its four
            held = torch.einsum("dn,de,en->n", basis[:, :2], grams[head], basis[:, :2]) / grams[head].trace()
            assert shares[str(site), head].to_numpy() == pytest.approx(held.numpy(), abs=1e-4)
    assert not [record for record in caplog.records if "estimator" in record.message]


def test_overlap_and_playground_are_of_the_runs_estimator(run_by, caplog):
    one, two = run_by("one", "attribution"), run_by("two", "no-sink")
    ask = Ask("Tom has 12 apples.", layers=[1], kinds=["v"], rank=3)
    assert Playground(two).subspace(ask).origin["estimator"] == "no-sink"
    whole = Playground(one).subspace(replace(ask, layers=[1, 3], kinds=["k", "v"], rank=0.5))
    assert whole.digest() == one.subspace.digest()
    overlap([one.run.path, two.run.path], rank="4", permutations=19, draws=99, shuffled=False, quiet=True)
    assert "estimator 'paper'" in caplog.text  # of the energies
    table = one.saved("overlap-angles")
    cosines = table[table.measure == "mean squared cosine"].set_index(["site", "head"]).value
    for site in one.subspace.sites:
        for head in range(2):
            both = (subject.subspace.projector(site)[head].numpy() for subject in (one, two))
            assert cosines[str(site), head] == pytest.approx(np.trace(next(both) @ next(both)) / 4)
