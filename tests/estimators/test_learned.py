"""The learned subspace: it goes away from harm, holds examples out, and says when it overfits."""

from __future__ import annotations

import logging
from statistics import fmean

import pytest
import torch

from spd_lens import tasks
from spd_lens.estimators import Calibration, Shape
from spd_lens.estimators.learned import Learned, _say
from spd_lens.estimators.objective import Effect, Objective
from spd_lens.evaluation import teacher_forced
from spd_lens.settings import Extraction
from spd_lens.sites import Site
from spd_lens.subspaces import Policy
from tests.helpers import EXAMPLES, assert_same_bits, refused, sine

VALUES = Extraction(engine="twin", layers=[3], kinds=["v"])
SITE = Site(3, "v")


def examples(n, seed=1):
    return tasks.get("synthetic-math").calibration(n, seed)


def learned(source, rank=4, **changes):
    return type("Changed", (Learned,), {"steps": 4, **changes})().subspace(source, Shape(rank=rank))


def test_it_goes_from_random_directions_to_all_but_one_that_is_not_used(fresh_pair):
    with torch.no_grad():  # without the first direction of the values nothing changes, without any other one something
        fresh_pair.hf.model.layers[3].self_attn.v_proj.weight[::8] = 0.0
        fresh_pair.hf.model.layers[3].self_attn.o_proj.weight[:, ::8] = 0.0
    source = Calibration(fresh_pair, examples(8), settings=VALUES)
    found = learned(source, rank=7, starts=("random",), steps=24, kl_weight=1e5)
    start = source.gradients().subspace(7).random_like(source.seed)
    unused = torch.eye(8, dtype=torch.float64)[:, [0]]
    for before, after in zip((~start).blocks(SITE), (~found).blocks(SITE), strict=True):
        assert sine(after, unused) < 0.3 < 0.6 < sine(before, unused)
    for kind in ("trained", "held_out"):
        first, last = found.origin[kind]
        assert last["kl"] < first["kl"] / 20


def test_it_lowers_the_loss_it_is_trained_for(tiny_pair):
    source = Calibration(tiny_pair, examples(8), settings=VALUES)
    first, last = learned(source, starts=("paper",), steps=12, kl_weight=0.0).origin["trained"]
    assert last["loss"] < first["loss"] - 0.2


def test_the_objective_is_what_teacher_forcing_measures(any_tiny_pair):
    short = [example for example in EXAMPLES if len(example.completion) < 16]
    subspace = Calibration(any_tiny_pair, EXAMPLES).gradients().subspace(3, center=True)
    found = Objective(any_tiny_pair, short, {"loss": "aligned"}, kl_weight=2.0).effect(subspace)
    wanted = teacher_forced(any_tiny_pair, short, [Policy("p", subspace)], progress=False)["p"]
    assert found.loss == pytest.approx(fmean(item.aligned_loss for item in wanted), rel=1e-5)
    assert found.kl == pytest.approx(fmean(item.kl for item in wanted), rel=1e-3)
    assert found.value == found.loss + 2.0 * found.kl


def test_what_it_holds_out_has_no_part_in_it(tiny_pair, state_of):
    before = state_of(tiny_pair.hf)
    own = examples(8)
    other = [*own[:3], *examples(1, seed=5), *own[4:7], *examples(2, seed=6)[1:]]
    one, two = (learned(Calibration(tiny_pair, chosen, settings=VALUES)) for chosen in (own, other))
    # rounding alone may differ: other texts have another length, and share other batches
    assert torch.allclose(one.projector(SITE), two.projector(SITE), atol=1e-4)
    assert one.origin["trained"][1]["loss"] == pytest.approx(two.origin["trained"][1]["loss"], abs=1e-4)
    assert one.origin["held_out"] != two.origin["held_out"] and one.origin["n_held_out"] == 2
    assert_same_bits(tiny_pair.hf, before)


def test_what_it_gives(tiny_qwen2_pair):
    source = Calibration(tiny_qwen2_pair, examples(8), settings=VALUES)
    found = learned(source, rank=3)
    assert found.ranks[SITE] == (3, 3) and found.origin["estimator"] == "learned" and not found.singular_values
    assert found.origin["start"] in Learned.starts and found.origin["n_examples"] == 6
    block = found.bases[SITE]
    assert torch.allclose(block.mT @ block, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), atol=1e-12)
    first, last = found.origin["trained"]
    assert last["loss"] + last["kl"] <= first["loss"] + first["kl"]
    assert found.digest() == learned(source, rank=3).digest()
    worse = learned(source, rank=3, lr=100.0)  # far beyond what may lower anything: the start is what is left
    assert worse.origin["trained"][0] == worse.origin["trained"][1]
    with refused("'learned' takes no energy", "rank"):
        Learned().subspace(source, Shape(energy=0.9))


def test_too_few_examples_to_hold_any_out_are_refused(tiny_pair):
    with refused("'learned' holds out every fourth shard", "3 examples", "at least four"):
        learned(Calibration(tiny_pair, examples(3), settings=VALUES))


@pytest.mark.parametrize(("held_out", "overfits"), [(2.5, True), (1.5, False)])
def test_overfitting_is_said(caplog, recwarn, held_out, overfits):
    start, end, tested = (Effect(loss, 0.1, loss) for loss in (2.0, 1.0, held_out))
    with caplog.at_level(logging.INFO, logger="spd_lens"):
        _say([start, end], [start, tested], 30, 10)
    assert f"2.000 -> 1.000 (KL from base 0.100 -> 0.100), of 10 held out 2.000 -> {held_out:.3f}" in caplog.text
    assert any("overfits" in str(caught.message) for caught in recwarn) == overfits
