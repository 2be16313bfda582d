import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import spd_lens as spd
from spd_lens.analysis.calibration import (
    faults as calibration_faults,
)
from spd_lens.analysis.calibration import (
    losses as calibration_losses,
)
from spd_lens.analysis.calibration import (
    size as calibration_size,
)
from spd_lens.analysis.calibration.faults import (
    AT_RANDOM,
    ENERGY,
    LEFT_OUT,
    agreement,
    biased,
    faults_figure,
    faults_sentence,
    misplaced_spans,
    sensitivity,
    summarise,
)
from spd_lens.analysis.calibration.size import losses_under, main, stability, stability_figure, stability_sentence
from spd_lens.analysis.common.agreements import MEASURES
from spd_lens.errors import SPDError
from spd_lens.evaluation.teacher_forced import teacher_forced
from spd_lens.subspaces.moments import GradientMoments
from spd_lens.subspaces.policy import Policy

SITE = spd.Site(1, "v")


def made_up(rows_of, pair, *, each=1):
    """Moments in which shard `i` has the gradient rows `rows_of[i]`, `[token, 16]`, at one site of two heads."""
    moments = GradientMoments.empty(pair.fingerprint, [SITE], len(rows_of), {"loss": "aligned", "dtype": "float64"})
    for shard, rows in enumerate(rows_of):
        moments.add_tokens(SITE, shard, rows, torch.zeros_like(rows))
        moments.n_tokens[shard] += len(rows)
    moments.n_examples += each
    return moments


def noisy(n, *, noise, seed=0, signal=4):
    """Shards whose rows share a `signal`-dimensional space per head, plus noise everywhere."""
    generator = torch.Generator().manual_seed(seed)
    rows = noise * torch.randn(n, 6, 2, 8, generator=generator, dtype=torch.float64)
    rows[..., :signal] += torch.randn(n, 6, 2, signal, generator=generator, dtype=torch.float64)
    return rows.flatten(2)


@pytest.fixture
def moments(tiny_pair):
    return made_up(noisy(24, noise=0.3), tiny_pair)


def test_measures_of_a_known_rotation(tiny_pair):
    """Head 0: two directions, one of them turned by 30°. Head 1: the same two."""
    theta = math.radians(30)
    first, second = torch.zeros(2, 16, dtype=torch.float64), torch.zeros(2, 16, dtype=torch.float64)
    first[0, 0] = first[1, 1] = second[0, 0] = 2.0
    second[1, 1], second[1, 2] = math.cos(theta), math.sin(theta)
    for rows in (first, second):
        rows[0, 8], rows[1, 9] = 3.0, 1.0
    a = made_up([first], tiny_pair).subspace(2)
    rows = pd.DataFrame(agreement(a, made_up([second], tiny_pair), 2, {"draw": 0}))
    values = rows.set_index(["head", "measure"]).value
    # energy 4 lies along the shared direction, of energy 1 along the turned one cos² θ = 3/4 is held
    assert values["0", ENERGY] == pytest.approx((4 + 0.75) / 5, abs=1e-12)
    assert values["0", "mean squared cosine"] == pytest.approx((1 + 0.75) / 2, abs=1e-12)
    assert values["0", "mean angle"] == pytest.approx(15.0, abs=1e-5)
    assert values["1", ENERGY] == pytest.approx(1.0, abs=1e-12)
    assert values["1", "mean angle"] == pytest.approx(0.0, abs=1e-5)
    assert set(rows.site) == {"1.v"} and set(rows.kind) == {"v"} and set(rows.layer) == {1}


def test_stability_against_a_plain_reference(tiny_pair):
    """Two shards leave one division: the values of a joint subspace, written out with numpy's SVD."""
    shards = noisy(2, noise=0.5, seed=3)
    frame = stability(made_up(shards, tiny_pair), [1], rank=5, per_head=False, draws=1, seed=0)
    measured = frame[frame.of == "subspace"].set_index("measure").value
    (bases, grams) = zip(*((np.linalg.svd(g)[2][:5].T, g.T @ g) for g in shards.numpy()), strict=True)
    squares = np.linalg.svd(bases[0].T @ bases[1])[1] ** 2
    both = [np.trace(bases[i].T @ grams[1 - i] @ bases[i]) / np.trace(grams[1 - i]) for i in (0, 1)]
    assert min(abs(measured[ENERGY] - share) for share in both) < 1e-10
    assert measured["mean squared cosine"] == pytest.approx(squares.mean(), abs=1e-10)
    assert measured["mean angle"] == pytest.approx(np.degrees(np.arccos(np.sqrt(squares))).mean(), abs=1e-6)
    assert set(frame["head"]) == {"all"}


def test_more_examples_agree_better_and_random_ones_do_not(moments):
    frame = stability(moments, [1, 4, 12], rank=4, draws=6)
    means = frame.groupby(["measure", "of", "n_examples"]).value.mean()
    for measure in (ENERGY, "mean squared cosine"):
        values = means[measure, "subspace"]
        assert values[1] < values[4] < values[12]
        assert means[measure, "random"].between(0.4, 0.6).all()  # 4 of 8 directions
    assert means["mean angle", "subspace"].is_monotonic_decreasing
    assert frame.groupby("n_examples").draw.nunique().eq(6).all()
    assert not frame.value.isna().any()


def test_noise_free_examples_agree_wholly(tiny_pair):
    frame = stability(made_up(noisy(8, noise=0.0), tiny_pair), [2], rank=4, draws=3)
    mine = frame[frame.of == "subspace"].groupby("measure").value.agg(["min", "max"])
    assert mine.loc[ENERGY, "min"] == pytest.approx(1.0, abs=1e-9)
    assert mine.loc["mean angle", "max"] < 1e-4


def test_sets_are_disjoint_and_of_the_size_asked_for():
    rng = np.random.default_rng(0)
    pairs = list(calibration_size._disjoint(12, 2, 7, rng))
    assert len(pairs) == 7
    for first, second in pairs:
        assert len(first) == len(second) == 2 and not set(first) & set(second)
    side_by_side = [shard for pair in pairs[:3] for half in pair for shard in half]
    assert sorted(side_by_side) == list(range(12))


def test_a_seed_names_the_draws(moments):
    pd.testing.assert_frame_equal(stability(moments, [4], draws=2, seed=5), stability(moments, [4], draws=2, seed=5))
    other = stability(moments, [4], draws=2, seed=6)
    assert not other.value.equals(stability(moments, [4], draws=2, seed=5).value)


@pytest.mark.parametrize(
    ("sizes", "each", "says"),
    [([13], 1, "13 examples do not make two disjoint sets"), ([5], 2, "choose multiples of 2 up to 24")],
)
def test_impossible_sizes(tiny_pair, sizes, each, says):
    with pytest.raises(SPDError, match=says):
        stability(made_up(noisy(24, noise=0.3), tiny_pair, each=each), sizes)


def test_uneven_shards(tiny_pair):
    uneven = made_up(noisy(3, noise=0.3), tiny_pair)
    uneven.n_examples[1] += 1
    with pytest.raises(SPDError, match="4 examples in 3 shards cannot be divided evenly"):
        stability(uneven)


def test_spoiled_examples_move_the_subspace_and_their_absence_does_not(moments, tiny_pair):
    """Spoiled gradients lie in the other four dimensions and are three times as large."""
    elsewhere = 3 * noisy(24, noise=0.1, seed=1).unflatten(-1, (2, 8)).flip(-1).flatten(2)
    frame = sensitivity(moments, {"wrong": made_up(elsewhere, tiny_pair)}, (0.5, 1.0), rank=4, draws=4)
    means = frame[frame.measure == ENERGY].groupby(["of", "fault", "share"]).value.mean()
    ceiling = means["subspace", "wrong", 0.0]
    assert ceiling == pytest.approx(means["subspace", LEFT_OUT, 0.0], abs=1e-12) and ceiling > 0.85
    assert means["subspace", "wrong", 0.5] < 0.4 and means["subspace", "wrong", 1.0] < 0.2
    assert ceiling - 0.05 < means["subspace", LEFT_OUT, 0.5] <= ceiling + 0.01
    assert (LEFT_OUT, 1.0) not in means["subspace"].index  # nothing would be left
    assert means["random"].between(0.35, 0.65).all()


def test_a_fault_that_changes_nothing_keeps_the_ceiling(moments):
    frame = sensitivity(moments, {"none at all": moments}, (0.5, 1.0), rank=3, draws=2)
    mine = frame[(frame.fault == "none at all") & (frame.measure == ENERGY)]
    by_share = mine.pivot_table(index=["head", "draw"], columns="share", values="value")
    assert np.allclose(by_share[0.0], by_share[1.0], atol=1e-12) and np.allclose(by_share[0.0], by_share[0.5])


def test_spoiled_moments_of_other_shards_are_refused(moments):
    with pytest.raises(SPDError, match="not of the same sites and shards"):
        sensitivity(moments, {"wrong": moments.shards(range(4))})
    with pytest.raises(SPDError, match="share 1.5"):
        sensitivity(moments, {}, (1.5,))


def test_the_other_half_is_new(tiny_pair):
    """Every example has a direction of its own, so that a subspace holds nothing of examples that it has not seen."""
    rows = torch.zeros(8, 1, 16, dtype=torch.float64)
    rows[range(8), 0, range(8)] = rows[range(8), 0, range(8, 16)] = 1.0
    clean = made_up(rows, tiny_pair)
    for frame in (
        sensitivity(clean, {"none": clean}, (0.5,), rank=4, draws=3),
        biased(clean, {"order": list(range(8))}, (0.5,), rank=4, draws=3),
        stability(clean, [4], rank=4, draws=3),
    ):
        mine = frame[(frame.of == "subspace") & (frame.measure == ENERGY)]
        assert len(mine) and mine.value.abs().max() < 1e-12


def test_a_biased_choice_is_worse_than_as_many_at_random(tiny_pair):
    """Even shards have two dimensions alone, odd ones the other two as well."""
    rows = noisy(24, noise=0.05)
    rows.unflatten(-1, (2, 8))[::2, :, :, 2:4] = 0.0
    clean = made_up(rows, tiny_pair)
    keys = {"even first": [i % 2 for i in range(24)], "by name": ["odd" if i % 2 else "even" for i in range(24)]}
    frame = biased(clean, keys, (0.25,), rank=4, draws=6)
    means = frame[frame.measure == ENERGY].groupby(["of", "fault", "share"]).value.mean()
    assert means["subspace", "even first", 0.25] < means["subspace", AT_RANDOM, 0.25] - 0.1
    whole = means["subspace", AT_RANDOM, 1.0]
    assert means["subspace", "even first", 1.0] == pytest.approx(whole, abs=1e-12) and whole > 0.95
    # one group by itself never has what the other adds
    by_name = frame[(frame.fault == "by name") & (frame.share == 0.25) & (frame.measure == ENERGY)]
    assert by_name.value.min() < means["subspace", AT_RANDOM, 0.25] - 0.1


def test_groups_are_chosen_whole_and_in_random_order():
    names = ["b" if i % 3 else "a" for i in range(12)]
    half = [7, 3, 4, 11, 0, 6, 2]
    first = set()
    for seed in range(8):
        order = calibration_faults._ordered(half, names, np.random.default_rng(seed))
        assert sorted(order) == sorted(half)
        groups = [names[i] for i in order]
        assert groups in (sorted(groups), sorted(groups, reverse=True))  # one group after the other
        first.add(groups[0])
    assert first == {"a", "b"}
    assert calibration_faults._ordered([2, 0, 1], [0.5, -1.0, 0.1], np.random.default_rng(0)) == [1, 2, 0]


def test_choices_are_those_that_differ():
    subjects = [spd.Example("q" * n, "A", [(0, 1)], str(n), {"subject": "law" if n > 2 else "art"}) for n in (3, 1, 2)]
    found = calibration_size._choices(subjects)
    assert found["shortest examples"] == [4, 2, 3] and found["longest examples"] == [-4, -2, -3]
    assert found["few subjects"] == ["law", "art", "art"]
    assert calibration_size._choices(subjects[1:2] * 3) == {}


def test_biased_needs_single_examples_and_all_keys(moments, tiny_pair):
    with pytest.raises(SPDError, match="one example per shard"):
        biased(made_up(noisy(4, noise=0.1), tiny_pair, each=2), {})
    with pytest.raises(SPDError, match="has 3 keys for 24 examples"):
        biased(moments, {"length": [1, 2, 3]})


def test_pooled_shards_are_the_sum(moments):
    one = moments.pooled()
    assert one.n_shards == 1 and int(one.n_examples) == 24 and int(one.n_tokens) == 24 * 6
    assert torch.equal(one.gradient[SITE][0], moments.gradient[SITE].sum(dim=0))


def test_misplaced_spans_lie_on_another_word():
    examples = spd.tasks.get("synthetic-math").calibration(20, 42)
    moved = misplaced_spans(examples, 0)
    for old, new in zip(examples, moved, strict=True):
        assert (old.prompt, old.completion, old.id) == (new.prompt, new.completion, new.id)
        assert len(new.spans) == len(old.spans)
        for start, end in new.spans:
            assert old.completion[start:end].split() == [old.completion[start:end]]
            assert all(end <= a or b <= start for a, b in old.spans)
    assert len({new.completion[slice(*new.spans[0])] for new in moved}) > 3
    assert moved == misplaced_spans(examples, 0) != misplaced_spans(examples, 1)


def test_spans_that_cannot_move():
    with pytest.raises(SPDError, match="cannot be moved"):
        misplaced_spans([spd.Example("2 + 2", "4", [(0, 1)], "sum")], 0)


def test_losses_are_paired_and_averaged_over_draws(tiny_pair):
    items = spd.tasks.get("synthetic-math").test(12, 42)
    moments = spd.extract(tiny_pair, items[:6], progress=False)
    two = [half.subspace(4) for half in moments.halves()]
    table = losses_under(tiny_pair, {"n=3": two, "random": [two[0].random_like(0)]}, items, progress=False)
    plain = teacher_forced(tiny_pair, items, [Policy("base"), Policy("a", two[0]), Policy("b", two[1])], progress=False)
    a, b, base = (np.array([item.aligned_loss for item in plain[name]]) for name in ("a", "b", "base"))
    rows = table.set_index(["label", "measure"])
    found = rows.loc["n=3", "change of aligned loss"]
    assert found.value == pytest.approx(((a + b) / 2 - base).mean(), abs=1e-6)
    assert found.low < found.value < found.high and found.n == 12
    kl = np.mean([[item.kl for item in plain[name]] for name in "ab"])
    assert rows.loc["n=3", "KL from base"].value == pytest.approx(kl, abs=1e-6)
    fig = calibration_losses.losses_figure(table, "KL from base", title="KL")
    assert [trace.name for trace in fig.data] == ["subspace", "random subspaces"]
    assert "nats" in fig.layout.yaxis.title.text


def _no_nan(fig):
    for trace in fig.data:
        assert len(trace.x) and len(trace.x) == len(trace.y), trace.name
        assert np.isfinite(np.asarray(trace.y, dtype=float)).all(), trace.name


def test_figures_have_titles_legends_nulls_and_no_holes(moments):
    frame = stability(moments, [1, 4, 12], rank=4, draws=3)
    for measure in MEASURES:
        fig = stability_figure(frame, measure)
        _no_nan(fig)
        shown = [trace.name for trace in fig.data if trace.showlegend is not False]
        assert shown == ["random subspaces", "1.v"]
        assert {trace.line.dash for trace in fig.data if trace.name == "random subspaces"} == {"dot"}
        assert "examples" in fig.layout.xaxis.title.text and fig.layout.yaxis.title.text
        table = summarise(frame[frame.measure == measure], ["n_examples"])
        assert list(fig.data[-1].y) == list(table[table.of == "subspace"].value)
    with pytest.raises(SPDError, match="unknown measure 'cosine'"):
        stability_figure(frame, "cosine")
    spoilt = sensitivity(moments, {"wrong": moments}, (0.5, 1.0), rank=4, draws=2)
    fig = faults_figure(spoilt, "share spoiled")
    _no_nan(fig)
    assert {"wrong", "random subspaces", LEFT_OUT} <= {trace.name for trace in fig.data}


def test_summaries_average_heads_before_they_span_draws():
    rows = [
        {"site": "1.v", "layer": 1, "kind": "v", "head": head, "n_examples": 4, "draw": draw, "of": "subspace",
         "measure": ENERGY, "value": value}
        for head, draw, value in (("0", 0, 0.2), ("1", 0, 0.4), ("0", 1, 0.6), ("1", 1, 0.6))
    ]  # fmt: skip
    row = summarise(pd.DataFrame(rows), ["n_examples"]).iloc[0]
    assert (row.value, row.low, row.high) == pytest.approx((0.45, 0.3, 0.6))


def test_sentences_follow_the_data(tiny_pair):
    flat = stability(made_up(noisy(24, noise=0.0), tiny_pair), [2, 6, 12], rank=4, draws=3)
    assert "hold 1.000" in stability_sentence(flat)
    steep = stability(made_up(noisy(24, noise=0.7), tiny_pair), [1, 12], rank=4, draws=6)
    assert "still rises" in stability_sentence(steep)
    nothing = stability(made_up(noisy(24, noise=50.0), tiny_pair), [4], rank=4, draws=6)
    assert "no more than random ones" in stability_sentence(nothing)
    clean = made_up(noisy(24, noise=0.3), tiny_pair)
    elsewhere = made_up(3 * noisy(24, noise=0.1, seed=1).unflatten(-1, (2, 8)).flip(-1).flatten(2), tiny_pair)
    text = faults_sentence(sensitivity(clean, {"wrong answers": elsewhere}, (1.0,), rank=4, draws=2))
    assert text.startswith("Energy share of a clean half: wrong answers 100%: 0.0") and "half-split ceiling 0.9" in text


def test_the_command_on_a_run(finished_run, tmp_path, capsys):
    run = tmp_path / "copy"
    shutil.copytree(finished_run.path, run)
    main([run], sizes="2,4,9999", draws=2, items=4, quiet=True)
    folder = run / "analysis"
    frame = pd.read_csv(folder / "calibration_size.csv")
    assert set(frame.n_examples) == {2, 4}
    faults = pd.read_csv(folder / "calibration_size-faults.csv")
    assert {"wrong answers", "misplaced spans", LEFT_OUT, AT_RANDOM, "shortest examples"} <= set(faults.fault)
    losses = pd.read_csv(folder / "calibration_size-losses.csv")
    assert list(dict.fromkeys(losses.label)) == ["2 examples", "4 examples", "random"]
    facts = json.loads((folder / "calibration_size.json").read_text())
    assert facts["n_examples"] == 8 and facts["sizes"] == [2, 4]
    assert "half-split ceiling" in (folder / "calibration_size-faults.html").read_text()
    shown = capsys.readouterr().out
    assert "agreement of disjoint sets" in shown and "[2, 4] alone are possible" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("sizes", "says"), [("a,b", "no numbers of examples"), ("0", "no numbers"), ("99999", "fewer")]
)
def test_bad_sizes(finished_run, sizes, says):
    with pytest.raises(SPDError, match=says):
        main([finished_run.path], sizes=sizes, quiet=True)


def test_unknown_rank(finished_run):
    with pytest.raises(SPDError, match="neither an integer nor a fraction"):
        main([finished_run.path], rank="half", quiet=True)


def test_moments_of_a_real_extraction_serve_all_sizes(tiny_pair):
    """One example per shard: any size is a sum of shards, the same as extracting those examples alone."""
    examples = spd.tasks.get("synthetic-math").calibration(6, 42)
    shards = spd.extract(tiny_pair, examples, shards=6, progress=False)
    alone = spd.extract(tiny_pair, examples[2:5], progress=False)
    some = shards.shards([2, 3, 4]).pooled()
    for site in alone.sites:
        assert torch.allclose(some.gradient[site][0], alone.gradient[site].sum(dim=0), rtol=1e-4)
    assert replace(some, settings={}).n_examples.tolist() == [3]
