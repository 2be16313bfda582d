import itertools
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from scipy import stats

import spd_lens as spd
from spd_lens.analysis.common.agreements import ENERGY, MEASURES
from spd_lens.analysis.distilled.absorption import absorbed, absorption, absorption_figure, absorption_sentence
from spd_lens.analysis.distilled.drift import (
    drift,
    drift_figure,
    drift_sentence,
    main,
    moments_after,
    spectra_before_after,
    spectra_figure,
)
from spd_lens.errors import SPDError
from spd_lens.subspaces.moments import GradientMoments
from tests.helpers import assert_same_bits, make_adapter

SITE = spd.Site(1, "k")


@pytest.fixture(scope="module")
def examples():
    return spd.tasks.get("synthetic-math").calibration(8, 42)


@pytest.fixture(scope="module")
def adapter(tiny_pair, tmp_path_factory):
    return make_adapter(tiny_pair.hf, tmp_path_factory.mktemp("tuned") / "adapter", std=0.1)


def turned(pair, degrees):
    """Eight shards: in each head one direction, after training turned by an angle; energies 4 and 9."""
    theta = math.radians(degrees)
    before, after = torch.zeros(1, 16, dtype=torch.float64), torch.zeros(1, 16, dtype=torch.float64)
    before[0, 0], before[0, 8] = 2.0, 3.0
    after[0, 0], after[0, 1] = 2 * math.cos(theta), 2 * math.sin(theta)
    after[0, 8], after[0, 9] = 3 * math.cos(theta), 3 * math.sin(theta)
    made = []
    for rows in (before, after):
        moments = GradientMoments.empty(pair.fingerprint, [SITE], 8, {"loss": "aligned", "dtype": "float64"})
        for shard in range(8):
            moments.add_tokens(SITE, shard, rows, rows)
        moments.n_examples += 1
        moments.n_tokens += 1
        made.append(moments)
    return made


def test_a_turn_by_30_degrees_is_30_degrees(tiny_pair):
    frame = drift(*turned(tiny_pair, 30), rank=1)
    cells = frame.set_index(["of", "measure", "head"])
    for head in ("0", "1"):
        angle = cells.loc["before, after", "mean angle", head]
        assert [angle.value, angle.low, angle.high] == pytest.approx([30] * 3, abs=1e-6)  # all shards are alike
        assert cells.loc["before, after", ENERGY, head].value == pytest.approx(0.75, abs=1e-12)
        assert cells.loc["after, after", ENERGY, head].value == pytest.approx(1, abs=1e-12)
        assert cells.loc["halves before", "mean angle", head].value == pytest.approx(0, abs=1e-5)
    assert "turned it by 30.0° on average, no less than choosing other examples" in drift_sentence(frame)
    assert (frame.of == "after, after").sum() == 2  # of the energy share alone


def test_no_training_no_drift(tiny_pair, examples):
    moments = spd.extract(tiny_pair, examples, progress=False)
    frame = drift(moments, moments, rank=3)
    mine = frame[frame.of == "before, after"].set_index(["measure", "site", "head"])
    # arccos resolves angles near 0 to the square root of the rounding error
    assert np.allclose(mine.loc["mean squared cosine"].value, 1) and mine.loc["mean angle"].value.max() < 1e-4
    most = frame[frame.of == "after, after"].value.to_numpy()
    assert np.allclose(mine.loc[ENERGY].value, most)
    assert "less than choosing other examples" in drift_sentence(frame)
    noise = frame[(frame.of == "random") & (frame.measure == "mean squared cosine")].value.mean()
    assert 0.2 < noise < 0.55  # 3 of 8 directions


def test_intervals_are_of_halves_drawn_alike_before_and_after(tiny_pair, examples):
    """Written out: Student's t with 7 degrees of freedom on the spread of the energy share over all 70 halves."""
    before = spd.extract(tiny_pair, examples, layers=[3], kinds="v", progress=False)
    others = spd.tasks.get("synthetic-math").calibration(16, 42)[8:]
    after = spd.extract(tiny_pair, others, layers=[3], kinds="v", progress=False)
    site = spd.Site(3, "v")
    after.n_tokens = before.n_tokens.clone()  # otherwise refused: other examples in the shards
    frame = drift(before, after, rank=2)

    def share(index):
        old, new = (m.gradient[site][list(index)].sum(0)[:8, :8].numpy() for m in (before, after))
        basis = np.linalg.eigh(old)[1][:, -2:]
        return np.trace(basis.T @ new @ basis) / np.trace(new)

    width = stats.t.ppf(0.975, 7) * np.std([share(half) for half in itertools.combinations(range(8), 4)])
    row = frame[(frame.of == "before, after") & (frame.measure == ENERGY) & (frame["head"] == "0")].iloc[0]
    assert row.value == pytest.approx(share(range(8)), abs=1e-9)
    assert row.low == pytest.approx(max(0, row.value - width), abs=1e-9)
    assert row.high == pytest.approx(min(1, row.value + width), abs=1e-9)


def test_moments_after_are_those_of_the_adapted_model(tiny_pair, examples, adapter, state_of):
    state = state_of(tiny_pair.hf)
    after = moments_after(tiny_pair, adapter, examples, progress=False)
    assert_same_bits(tiny_pair.hf, state)
    merged = spd.load(str(adapter), dtype="float32", device="cpu")  # the other way: merged, on the lens model
    reference = spd.extract(merged, examples, engine="lens", progress=False)
    before = spd.extract(tiny_pair, examples, progress=False)
    for site in after.sites:
        assert torch.allclose(after.gradient[site], reference.gradient[site], rtol=1e-3, atol=1e-6)
        assert not torch.allclose(after.gradient[site], before.gradient[site], rtol=0.05)


def test_other_examples_are_refused(tiny_pair, examples):
    a = spd.extract(tiny_pair, examples, progress=False)
    with pytest.raises(SPDError, match="not of the same sites and examples"):
        drift(a, spd.extract(tiny_pair, examples[::-1], progress=False))
    with pytest.raises(SPDError, match="not of the same sites and examples"):
        spectra_before_after(a, spd.extract(tiny_pair, examples, layers=[0], progress=False))


def test_spectra_of_known_energies(tiny_pair):
    before, after = turned(tiny_pair, 40)
    frame = spectra_before_after(before, after).set_index(["of", "head", "rank"])
    for of in ("before", "after"):
        assert frame.loc[of, "0", 1].singular_value == pytest.approx(math.sqrt(8 * 4))
        assert frame.loc[of, "0", 1].share_of_model == pytest.approx(4 / 13)
        assert frame.loc[of, "1", 1].share_of_model == pytest.approx(9 / 13)
        assert frame.loc[of, "1", 1].cumulative == pytest.approx(1)
    assert frame.loc["before"].cumulative.groupby("head").is_monotonic_increasing.all()


def test_absorption_against_plain_kl(tiny_pair, examples, adapter, state_of):
    """KL(projected || model) with probabilities written out, one item at a time, projection by float64 weights."""
    items = examples[:3]
    subspace = spd.extract(tiny_pair, examples, progress=False).subspace(3)
    state = state_of(tiny_pair.hf)
    frame = absorption(tiny_pair, items, subspace, adapter, n_random=2, seed=4, progress=False)
    assert_same_bits(tiny_pair.hf, state)
    fresh = spd.load(tiny_pair.name, dtype="float64", device="cpu")

    def probabilities(model, e):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([e.ids]), use_cache=False).logits[0]
        return logits[e.completion_start - 1 : -1].double().softmax(-1)

    for of, kept in (("projected", subspace), ("random-1", subspace.random_like(5))):
        for item in items:
            e = fresh.encode(item)
            with spd.folded(fresh.hf, kept):
                p = probabilities(fresh.hf, e)
            base = probabilities(fresh.hf, e)
            other = spd.load(tiny_pair.name, dtype="float64", device="cpu")
            tuned = probabilities(PeftModel.from_pretrained(other.hf, str(adapter)).eval(), e)
            row = frame[(frame.item == item.id) & (frame.of == of)].iloc[0]
            assert row.kl_base == pytest.approx((p * (p / base).log()).sum(-1).mean().item(), rel=1e-3, abs=1e-5)
            assert row.kl_tuned == pytest.approx((p * (p / tuned).log()).sum(-1).mean().item(), rel=1e-3, abs=1e-5)
    assert sorted(set(frame.of)) == ["projected", "random-0", "random-1"] and len(frame) == 9


def made_up_kls(projected, random):
    """Twelve items; the tuned model's KL is a multiple of the base model's, with a little noise."""
    rng = np.random.default_rng(0)
    rows = []
    for i, kl in enumerate(rng.uniform(0.5, 1.5, 12)):
        for of, factor in (("projected", projected), ("random-0", random), ("random-1", random)):
            rows.append(
                {"item": str(i), "of": of, "kl_base": kl, "kl_tuned": kl * (factor + 0.01 * rng.standard_normal())}
            )
    return pd.DataFrame(rows)


def test_absorbed_shares():
    frame = made_up_kls(0.6, 0.9)
    found = absorbed(frame)
    sums = frame[frame.of == "projected"][["kl_base", "kl_tuned"]].sum()
    assert found["share"].value == pytest.approx(1 - sums.kl_tuned / sums.kl_base) == pytest.approx(0.4, abs=0.01)
    assert found["random share"].value == pytest.approx(0.1, abs=0.01)
    assert found["share beyond random"].value == pytest.approx(0.3, abs=0.01)
    assert found["share beyond random"].low > 0.25 and found["share"].n == 12
    assert found["KL"].value == pytest.approx((sums.kl_tuned - sums.kl_base) / 12)
    assert absorption_sentence(found).endswith("more than towards random ones.")
    assert absorption_sentence(absorbed(made_up_kls(0.9, 0.6))).endswith("less than towards random ones.")
    assert absorption_sentence(absorbed(made_up_kls(0.9, 0.9))).endswith("within noise.")
    away = absorption_sentence(absorbed(made_up_kls(1.3, 1.0)))
    assert "moved away" in away and "moved away" not in absorption_sentence(found)
    alone = absorbed(frame[frame.of == "projected"])
    assert "share beyond random" not in alone and "no random" in absorption_sentence(alone)
    assert absorption_sentence(absorbed(frame[frame.item == "3"])).endswith("too few items to say.")


def test_the_projected_model_itself_has_absorbed_everything(tiny_pair, examples, tmp_path):
    subspace = spd.extract(tiny_pair, examples, progress=False).subspace(3)
    checkpoint = spd.fold_to(tiny_pair.hf, subspace, tmp_path / "folded")
    frame = absorption(tiny_pair, examples[:3], subspace, checkpoint, n_random=2, progress=False)
    found = absorbed(frame)
    assert found["share"].value == pytest.approx(1, abs=1e-4) and found["share beyond random"].value > 0.1


def test_no_items(tiny_pair, examples, adapter):
    subspace = spd.extract(tiny_pair, examples, progress=False).subspace(3)
    with pytest.raises(SPDError, match="no items"):
        absorption(tiny_pair, [], subspace, adapter)


def _finite(fig):
    assert fig.layout.xaxis.title.text and fig.layout.yaxis.title.text
    for trace in fig.data:
        assert len(trace.x) and np.isfinite(np.asarray(trace.y, dtype=float)).all(), trace.name


def test_figures(tiny_pair, examples, adapter):
    before = spd.extract(tiny_pair, examples, progress=False)
    after = moments_after(tiny_pair, adapter, examples, progress=False)
    frame = drift(before, after, rank=3)
    for measure in MEASURES:
        fig = drift_figure(frame, measure)
        _finite(fig)
        mine = fig.data[-1]
        assert mine.name == "before, after" and list(mine.x)[:2] == ["1.k 0", "1.k 1"]
        table = frame[(frame.of == "before, after") & (frame.measure == measure)]
        assert sorted(mine.y) == sorted(table.value)
        assert np.isfinite(mine.error_y.array).all() and min(mine.error_y.arrayminus) >= 0
    _finite(spectra_figure(spectra_before_after(before, after)))
    kls = made_up_kls(0.6, 0.9)
    fig = absorption_figure(kls)
    _finite(fig)
    means = {trace.name: trace for trace in fig.data}
    assert means["the subspace: mean"].y[0] == pytest.approx(-absorbed(kls)["KL"].value)
    top = means["the subspace: mean"].y[0] + means["the subspace: mean"].error_y.array[0]
    assert top == pytest.approx(-absorbed(kls)["KL"].low)
    with pytest.raises(SPDError, match="unknown measure"):
        drift_figure(frame, "angle")


def test_the_command_on_a_run(finished_run, tmp_path, capsys):
    run = tmp_path / "copy"
    shutil.copytree(finished_run.path, run)
    main([run], items=6, n_random=2, quiet=True)
    folder = run / "analysis"
    facts = json.loads((folder / "drift-absorption.json").read_text())
    assert facts["n_items"] == 6 and "share beyond random" in facts["estimates"]
    frame = pd.read_csv(folder / "drift.csv")
    assert {"before, after", "halves before", "random", "after, after"} == set(frame.of)
    mine = frame[frame.of == "before, after"]
    assert (mine.low <= mine.high).all()
    page = (folder / "drift.html").read_text()
    assert "Of the KL from the projected policy" in page
    assert "drift of copy" in capsys.readouterr().out


def test_a_run_without_adapter(finished_run, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(finished_run.path, run)
    shutil.rmtree(run / "adapter")
    with pytest.raises(SPDError, match="no adapter yet"):
        main([run], quiet=True)
