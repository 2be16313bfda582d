"""The benchmark of a whole run: both sides do the same, and what is compared is counted rightly."""

from __future__ import annotations

import pytest
import torch

import spd_lens as spd
from benchmarks import reference_way, subjects, whole_run
from benchmarks.reference_way import STAGES, Outcome
from benchmarks.whole_run import Sizes

SIZES = Sizes(n_calibration=3, n_train=9, n_eval=2, new_tokens=5, test_tokens=3)


@pytest.fixture(scope="module")
def both(tiny_llama_dir, tmp_path_factory):
    """The work, and what both sides made of it, with synthetic problems and a tiny model in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subjects, "DATA", tmp_path_factory.mktemp("none"))
        pair = whole_run.without_end(spd.load(str(tiny_llama_dir), dtype="float32", device="cpu"))
        config = whole_run.config_of(SIZES, "float32", lr=0.1)
        work = whole_run.work_of(pair, config)
        patch.setattr(reference_way, "LR", 0.1)
        before = {name: weight.clone() for name, weight in pair.hf.state_dict().items()}
        peer = reference_way.run(pair, work)
        assert all(torch.equal(weight, before[name]) for name, weight in pair.hf.state_dict().items())
        own = whole_run.ours(pair, config, tmp_path_factory.mktemp("runs"), 0)
    return work, own, peer, pair


def test_both_sides_generate_the_same_tokens_and_train_with_the_same_loss(both):
    _, own, peer, _ = both
    row = whole_run.same_tokens("m", "float32", own, peer)
    assert row.met and row.value == 1.0
    assert row.ours == row.peer == f"{9 * 5 + 2 * 2 * 3} tokens"
    losses = whole_run.same_losses("m", "float32", own, peer)
    assert losses.met and len(own.losses) == 3
    assert own.answers["base"] != own.answers["spd"]


def test_every_stage_has_its_time_on_both_sides_and_the_rest_of_a_run_is_counted_apart(both):
    _, own, peer, _ = both
    assert set(own.seconds) == set(peer.seconds) == {*STAGES, "all"}
    assert peer.seconds["all"] == pytest.approx(sum(peer.seconds[stage] for stage in STAGES))
    # those of a run are rounded to tenths
    assert own.beside > 0 and own.seconds["all"] > sum(own.seconds[stage] for stage in STAGES) - 0.05 * len(STAGES)


def test_both_sides_read_the_tokens_that_are_counted(both):
    """By the lengths of the texts, and by what training says of the tokens that it scores."""
    work, _, _, pair = both
    lengths = [len(ids) + SIZES.new_tokens for ids in work.prompts]
    assert whole_run.n_trained(work) == sum(min(256, length) for length in lengths)
    assert (len(work.calibration), len(work.prompts), len(work.items)) == (3, 9, 2)
    assert set(whole_run.ideal_seconds(pair, work)) == {*STAGES, "all"}


def test_sides_that_did_not_do_the_same_are_refused_or_told():
    own, other = (Outcome(completions=made, losses=[2.0, loss]) for made, loss in (([[1, 2]], 1.0), ([[1, 3]], 1.1)))
    assert whole_run.same_tokens("m", "float32", own, other).met is False
    assert whole_run.same_losses("m", "float32", own, other).value == pytest.approx(0.1 / 1.1)
    with pytest.raises(RuntimeError, match="equally many"):
        whole_run.same_tokens("m", "bfloat16", own, Outcome(completions=[[1]]))


def test_the_projector_of_the_reference_way_is_that_of_the_centred_rows():
    """Against the eigenvectors of the covariance in float64."""
    torch.manual_seed(0)
    rows = [torch.randn(n, 6) @ torch.diag(torch.tensor([9.0, 5.0, 3.0, 1.0, 0.5, 0.1])) + 4.0 for n in (5, 9)]
    site = spd.Site(0, "k")
    found = reference_way.projectors({site: rows})[site]
    wanted = torch.linalg.eigh(torch.cat(rows).double().T.cov()).eigenvectors[:, 3:]
    assert torch.allclose(found.double(), wanted @ wanted.T, atol=1e-5)
