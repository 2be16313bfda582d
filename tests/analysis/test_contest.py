"""The contest of estimators on a tiny model: equal damage, right numbers, no work twice, predictions as they fell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from spd_lens import estimators
from spd_lens.analysis.estimators import engine
from spd_lens.analysis.estimators.command import hold
from spd_lens.analysis.estimators.completions import accuracy, answers, scores
from spd_lens.analysis.estimators.engine import Held
from spd_lens.analysis.estimators.findings import contest_findings
from spd_lens.analysis.estimators.predictions import FAILED, HELD, OPEN, Prediction, Predictions, sha256
from spd_lens.analysis.estimators.report import says
from spd_lens.analysis.estimators.settings import Contest, Entrant, open_places
from spd_lens.analysis.estimators.tables import accuracy_differences, best, differences, entrants, everywhere, primary
from spd_lens.evaluation import KL_TOLERANCE, evaluate, other_texts
from spd_lens.evaluation.teacher_forced import teacher_forced
from spd_lens.stats import crossed_differences, holm, sign_flip
from spd_lens.study import grades_of
from spd_lens.subspaces import Subspace, read_findings, write_findings
from tests.helpers import refused

ASKED = {
    "estimators": ["paper", "attribution"], "spans": ["own", "results"], "ranks": [0.5], "draws": 2,
    "n_calibration": 6, "n_items": 8, "kl": 0.05, "n_texts": 4, "random_draws": 3, "n_completions": 2,
}  # fmt: skip
PREDICTED = {
    "written": "2026-11-30",
    "predictions": [
        {
            "claim": "Attribution does more | than chance.", "estimator": "attribution", "against": "random",
            "outcome": "results_loss", "direction": "lower",
        },
        {
            "claim": "Elsewhere.", "estimator": "paper", "against": "random", "outcome": "kl", "direction": "same",
            "model": "another",
        },
    ],
}  # fmt: skip


def written(folder, name, content):
    path = folder / name
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def settings(tiny_settings):
    return {key: tiny_settings[key] for key in ("model", "dtype", "device", "task", "task_options")}


@pytest.fixture(scope="module")
def held_contest(settings, tiny_pair, tmp_path_factory):
    """A finished contest: its folder, its table and the place."""
    folder = tmp_path_factory.mktemp("contest")
    place = written(folder, "tiny.yaml", settings)
    contest, predictions = written(folder, "contest.yaml", ASKED), written(folder, "predictions.yaml", PREDICTED)
    table = hold([place], contest, predictions, folder / "out", pair=tiny_pair, progress=False)
    return folder, table, place


def opened(place, out, pair, **changes):
    places, _ = open_places([place], out, pair=pair, progress=False)
    return Held(places[0], Contest(**{**ASKED, **changes}))


def test_every_cell_is_at_the_kl_and_is_measured_as_by_plain_calls(held_contest, tiny_pair):
    folder, _, place = held_contest
    held = opened(place, folder / "out", tiny_pair)
    texts = other_texts(4)
    for entrant in [*held.contest.entrants(), Entrant("random", "own", 0.5)]:
        assert all(cell["reached"] for cell in held.cells(entrant))
        policy = held.policy(entrant, 1)
        matched = teacher_forced(tiny_pair, texts[::2], [policy], progress=False)[policy.name]
        assert fmean(item.kl for item in matched) == pytest.approx(0.05, rel=KL_TOLERANCE)
        reported = teacher_forced(tiny_pair, texts[1::2], [policy], progress=False)[policy.name]
        assert held.cells(entrant)[1]["kl"] == pytest.approx(fmean(item.kl for item in reported))
        plain = teacher_forced(tiny_pair, held.items, [policy], progress=False)[policy.name]
        for outcome in ("aligned_loss", "results_loss", "rest_loss", "kl"):
            assert held.values(entrant, outcome)[1].tolist() == [getattr(item, outcome) for item in plain]


def test_subspaces_are_the_estimators_own_of_draws_that_share_no_example(held_contest, tiny_pair):
    folder, _, place = held_contest
    held = opened(place, folder / "out", tiny_pair)
    task = held.task.spanned("results")
    draws = held._calibrations(task)
    assert len(draws) == 2 and not {e.id for e in draws[0]} & {e.id for e in draws[1]}
    assert [len(draw) for draw in draws] == [6, 6]
    source = estimators.Calibration(tiny_pair, draws[1], seed=43, settings=held.config.extraction)
    entrant = Entrant("attribution", "results", 0.5)
    plain = estimators.get("attribution").subspace(source, estimators.Shape(0.5))
    assert held.store.read(entrant.cell(1))["digest"] == plain.digest()
    assert held.store.read(entrant.cell(0))["digest"] != plain.digest()
    own = held.store.read(Entrant("attribution", "own", 0.5).cell(1))
    assert own["digest"] != plain.digest()


@pytest.mark.parametrize("outcome", ["results_loss", "kl"])
def test_differences_are_those_of_the_stored_items(held_contest, tiny_pair, outcome):
    """Every entrant against random and, but for the paper's own, against the paper's, as one family."""
    folder, table, place = held_contest
    held = opened(place, folder / "out", tiny_pair)
    paper, random = Entrant("paper", "own", 0.5), Entrant("random", "own", 0.5)
    pairs = [
        (entrant, other)
        for entrant in held.contest.entrants() for other in (random, paper) if not entrant == other == paper
    ]  # fmt: skip
    family = [(*(held.values(one, outcome) for one in pair), pair[1] == paper) for pair in pairs]
    rows = table[(table.outcome == outcome) & (table.against != "base")]
    assert len(rows) == len(pairs) == 7
    for row, (entrant, other), found in zip(rows.itertuples(), pairs, crossed_differences(family), strict=True):
        assert (row.estimator, row.span, row.against) == (entrant.estimator, entrant.span, other.estimator)
        named = ("value", "low", "high", "p", "se", "p_holm", "detectable", "shown")
        assert [getattr(row, name) for name in named] == [getattr(found, name) for name in named]
        assert (row.n_items, row.n_draws) == (8, 2)
    base = held.values(None, outcome)
    changes = table[(table.outcome == outcome) & (table.against == "base")]
    assert [row.value for row in changes.itertuples()] == pytest.approx(
        [(held.values(one, outcome) - base).mean() for one in [*held.contest.entrants(), random]]
    )
    assert changes.p_holm.isna().all() and not any(changes.shown)
    for row, one in zip(changes.itertuples(), [*held.contest.entrants(), random], strict=True):
        own = held.values(one, outcome)
        (alone,) = crossed_differences([(own, np.broadcast_to(base, own.shape), True)])
        assert (row.low, row.high) == (alone.low, alone.high)  # whatever else is among the entrants
    assert table[table.primary].outcome.unique().tolist() == ["results_loss"]


def test_a_place_that_reaches_nothing_loses_no_report(settings, tiny_pair, tmp_path):
    """Keys of the last layer alone move the tiny model too little."""
    places = [
        written(tmp_path, "far.yaml", settings),
        written(tmp_path, "near.yaml", {**settings, "kinds": ["k"], "layers": [1]}),
    ]
    contest = written(tmp_path, "contest.yaml", {**ASKED, "spans": ["own"], "n_completions": 0, "kl": 0.28})
    table = hold(places, contest, out=tmp_path / "out", pair=tiny_pair, progress=False)
    assert set(table.place) == {"far"}
    entrants_of = pd.read_csv(tmp_path / "out" / "contest-entrants.csv")
    assert (entrants_of[entrants_of.place == "near"].n_reached == 0).all()
    with refused("no entrant moves"):
        hold(places[1:], contest, out=tmp_path / "alone", pair=tiny_pair, progress=False)


def test_other_data_under_the_same_ids_are_refused(settings, tiny_pair, tmp_path):
    def records(answer):
        rows = [
            {"prompt": f"Say {n}.", "completion": f"It is {n + answer}.", "answer": str(n + answer)} for n in range(40)
        ]
        (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return opened(place, tmp_path / "out", tiny_pair)

    place = written(tmp_path, "own.yaml", {**settings, "task": str(tmp_path / "mine.jsonl"), "task_options": {}})
    before = records(0)
    before.store.check(before._settings())
    after = records(1)
    assert [item.id for item in after.items] == [item.id for item in before.items]
    with refused("sources"):
        after.store.check(after._settings())


def test_greedy_answers_are_scored_as_evaluate_scores_them(held_contest, tiny_pair):
    folder, _, place = held_contest
    held = opened(place, folder / "out", tiny_pair)
    found = answers(held, differences(held))
    right = scores(held, found)
    rows = accuracy(held, found, right, accuracy_differences(held, right)).to_dict("records")
    assert json.loads((folder / "out" / "contest.json").read_text())["accuracy"] == rows
    assert [row["policy"] for row in rows[:3]] == ["base", "paper", "random"] and rows[3]["policy"].startswith("best: ")
    for row, entrant in zip(rows[:3], [None, Entrant("paper", "own", 0.5), Entrant("random", "own", 0.5)], strict=True):
        policy = None if entrant is None else held.policy(entrant)
        plain = evaluate(tiny_pair, held.task, 2, policy=policy, seed=held.config.data_seed, progress=False)
        truncated = fmean(item.finish_reason == "length" for item in plain.items)
        assert right[entrant].tolist() == [[item.score for item in plain.items]]
        assert (row["accuracy"], row["truncated"], row["n"]) == (plain.accuracy.interval, truncated, 2)
    assert rows[0]["change"] == "" and all("[" in row["change"] and not row["minus_random"] for row in rows[1:])
    assert accuracy_differences(held, right).empty
    report = (folder / "out" / "contest.md").read_text()
    assert "| greedy answers |" in report and "cut at the limit" in report
    first = held.items[0]
    held.task.judges = lambda item: item.id != first.id
    assert {name: own.tolist() for name, own in scores(held, found).items()} == {
        name: [own[0, 1:].tolist()] for name, own in right.items()
    }


def test_accuracy_over_draws_is_compared_as_the_losses_are(held_contest, tiny_pair):
    """Where each entrant answers under several draws: planted scores, as one family, and judged by predictions."""
    folder, _, place = held_contest
    held = opened(place, folder / "out", tiny_pair, completion_draws=2)
    assert [len(one) for one in answers(held, differences(held)).values()] == [1, 2, 2, 2]
    paper, random, rng = Entrant("paper", "own", 0.5), Entrant("random", "own", 0.5), np.random.default_rng(0)
    right = {None: np.ones((1, 40)), paper: np.ones((2, 40)), random: (rng.random((2, 40)) < 0.2).astype(float)}
    table = accuracy_differences(held, right)
    one = table[(table.estimator == "paper") & (table.against == "random")].iloc[0]
    plain = crossed_differences([(right[paper], right[random], False)])[0]
    assert (one.value, one.low, one.high, one.p_holm) == (plain.value, plain.low, plain.high, plain.p_holm)
    assert one.value == pytest.approx(1 - right[random].mean()) and not one.primary and one.outcome == "accuracy"
    assert list(table[table.against == "base"].value) == pytest.approx([0.0, right[random].mean() - 1])
    claim = {"claim": "c", "estimator": "paper", "against": "random", "outcome": "accuracy", "direction": "higher"}
    judged = list(Prediction(**claim).judged(table))
    assert [each["outcome"] for each in judged] == [HELD if one.shown else OPEN]
    more = opened(place, folder / "out", tiny_pair, n_completions=4, completion_draws=2)
    corpora = answers(more, differences(more))
    shown = accuracy(more, corpora, scores(more, corpora), table)
    row = shown[shown.policy == "paper"].iloc[0]
    assert row.minus_random.startswith(f"{one.value:+.2f} [") and row.draws == 2 and row.n == 4


def test_every_draw_has_findings_against_base_and_random(held_contest, tiny_pair):
    """Of its own subspace, whose null is that it is one more random one; p by the plain formula, Holm's correction."""
    folder, _, place = held_contest
    held = opened(place, folder / "out", tiny_pair)
    random, base = held.values(Entrant("random", "own", 0.5), "results_loss"), held.values(None, "results_loss")[0]
    found = read_findings(folder / "out" / "tiny")
    assert found == tuple(contest_findings(held)) and len(found) == 16
    every, raw = [(one, draw) for one in held.contest.entrants() for draw in range(2)], {"base": [], "random": []}
    for i, (entrant, draw) in enumerate(every):
        own, cell = held.values(entrant, "results_loss")[draw], f"cells/{entrant.cell(draw)}.json"
        against_base, against_random = found[2 * i : 2 * i + 2]
        parts = [((own - random.mean(0)).var(ddof=1) / 8, 7), (random.mean(1).var(ddof=1) * (1 + 1 / 3), 2)]
        total = sum(variance for variance, _ in parts)
        df = total**2 / sum(variance**2 / n for variance, n in parts)
        raw["random"].append(2 * stats.t.sf(abs(own.mean() - random.mean()) / total**0.5, df))
        raw["base"].append(sign_flip(own - base))
        for one, other, others in ((against_base, base, ["base"]), (against_random, random, [
            Entrant("random", "own", 0.5).cell(n) for n in range(3)])):  # fmt: skip
            assert one.difference.value == pytest.approx(own.mean() - other.mean())
            assert set(one.sources) == {cell, *(f"cells/{name}.json" for name in others)}
            assert (one.seed, one.kl, one.outcome, one.data) == (draw, 0.05, "results_loss", "held-out")
            assert one.digest == held.policy(entrant, draw).subspace.digest()
            assert one.fingerprint == tiny_pair.fingerprint.digest()
        assert (against_base.kl_against, against_random.kl_against) == (0.0, 0.05) and against_random.faces_random
    for against, ps in raw.items():
        of_side = [one for one in found if one.against == against]
        assert [one.p for one in of_side] == pytest.approx(holm(ps))
        assert {one.correction for one in of_side} == {"Holm over 8"}
    named = "spd on synthetic-math, own span, aligned loss, rank 0.5, layers last_mid"
    assert len({one.method for one in found}) == 4 and found[0].method == named


def test_a_subspace_shows_the_grade_of_its_findings(held_contest, tiny_pair, tmp_path):
    """Also from outside, but not where fewer directions than the file has reached the KL."""
    folder, _, place = held_contest
    out = Path(shutil.copytree(folder / "out", tmp_path / "out"))
    held = opened(place, out, tiny_pair, estimators=["attribution"], spans=["own"])
    entrant, random = Entrant("attribution", "own", 0.5), Entrant("random", "own", 0.5)
    base = held.values(None, "results_loss")[0]
    for name in [random.cell(n) for n in range(3)] + [entrant.cell(draw) for draw in range(2)]:
        record, gain = held.store.read(name), 1.0 if name.startswith("attribution") else -1.0
        noise = [0.01 * (i + int(name[-1])) for i in range(8)]
        record["items"]["results_loss"] = [*(base - gain + noise)]
        held.store.write(name, record)
    held.store.write(entrant.cell(1), {**held.store.read(entrant.cell(1)), "rank": 2})
    write_findings(held.place.folder, contest_findings(held))
    whole, lowered = (held.place.folder / "subspaces" / f"{entrant.cell(draw)}.safetensors" for draw in range(2))
    best, none = "beats random at equal damage", "none"
    assert (str(Subspace.load(whole).grade), str(Subspace.load(lowered).grade)) == (best, none)
    assert str(held.policy(entrant, 1).subspace.with_findings(*read_findings(held.place.folder)).grade) == best
    for where in (held.place.folder, held.place.folder.parent):
        grades = grades_of([where])
        assert [str(grades[path]) for path in (whole, lowered)] == [best, none] and len(grades) == 8
    with refused("run directory"):
        grades_of([tmp_path])
    shutil.copy(lowered, whole)
    with refused("is not the subspace that was measured"):
        contest_findings(held)


def test_the_results_of_programs_are_found_once_and_decide(settings, tiny_pair, tmp_path, monkeypatch):
    code = {"task": "synthetic-code", "task_options": {"difficulty": "easy", "max_new_tokens": 8}, "too_long": "drop"}
    place = written(tmp_path, "code.yaml", {**settings, **code})
    asked = {"estimators": ["paper"], "spans": ["own"], "n_items": 8, "n_calibration": 12, "n_texts": 2, "kl": 0.01}
    held = opened(place, tmp_path / "out", tiny_pair, **asked)
    plain = [held.task.with_results(item).marks["results"] for item in held.items]
    assert all(plain) and not any("results" in item.marks for item in held.items)
    held.measure()
    assert [item.marks["results"] for item in held.items] == plain
    assert primary(held) == "results_loss" and all(held.values(None, "results_loss")[0] > 0)
    again = opened(place, tmp_path / "out", tiny_pair, **asked)
    monkeypatch.setattr(type(again.task), "with_results", None)  # they are in the folder
    again.measure()
    assert [item.marks for item in again.items] == [item.marks for item in held.items]
    monkeypatch.setattr(type(again.task), "finds_results", False)
    with refused("finds_results"):
        opened(place, tmp_path / "out", tiny_pair, **asked).measure()


def test_it_goes_on_without_work_and_takes_more_entrants(held_contest, tiny_pair, tmp_path, monkeypatch):
    folder, table, place = held_contest
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    cells = out / "tiny" / "cells"
    lost = cells / f"{Entrant('attribution', 'results', 0.5).cell(1)}.json"
    lost.unlink()
    measured = []
    real = engine.all_at_equal_kl
    monkeypatch.setattr(
        engine,
        "all_at_equal_kl",
        lambda pair, made, *rest, **more: measured.append([*made]) or real(pair, made, *rest, **more),
    )
    monkeypatch.setattr(engine.estimators.Calibration, "gradients", None)  # the subspaces are there
    again = hold([place], folder / "contest.yaml", out=out, pair=tiny_pair, progress=False)
    assert measured == [[lost.stem]]
    pd.testing.assert_frame_equal(again, table)
    more = opened(place, out, tiny_pair, random_draws=4)
    more.measure()
    assert measured[1:] == [[Entrant("random", "own", 0.5).cell(3)]]
    with refused("a contest", "other settings", "kl"):
        opened(place, out, tiny_pair, kl=0.06).measure()


def test_the_files_say_what_was_found_and_what_was_predicted(held_contest):
    folder, table, _ = held_contest
    out = folder / "out"
    text = (out / "contest.md").read_text()
    facts = json.loads((out / "contest.json").read_text())
    assert facts["predictions_sha256"] == sha256(folder / "predictions.yaml") and "2026-11-30" in text
    assert facts["predictions_sha256"] in text and facts["contest_sha256"] in text
    assert [one["outcome"] for one in facts["predictions"]][1] == OPEN
    assert "Attribution does more \\| than chance." in text and "no place has this model and task" in text
    assert all(sentence in text for sentence in says(table))
    page = (out / "contest.html").read_text()
    assert "best: " in page and "http://" not in page.partition("<script")[0]
    assert len(pd.read_csv(out / "contest.csv")) == len(table)
    assert set(pd.read_csv(out / "contest-entrants.csv").n_reached) == {2, 3}


def test_what_does_not_reach_the_kl_says_so_and_is_left_out(held_contest, tiny_pair, tmp_path):
    _, _, place = held_contest
    held = opened(place, tmp_path, tiny_pair, spans=["own"], estimators=["attribution"])
    held.measure()
    for draw in range(2):
        held.store.write(Entrant("attribution", "own", 0.5).cell(draw), {"reached": draw == 0, **(
            {"strength": 1.0, "rank": 4, "kl": 0.1, "items": held.store.read("base")["items"]} if draw == 0 else {}
        )})  # fmt: skip
    table, reached = differences(held), entrants(held)
    assert "attribution" not in set(table.estimator) and best(held, table) is None
    row = reached[reached.estimator == "attribution"].iloc[0]
    assert row.n_reached == 1 and row.note == "not reached in 1 of 2"
    held = opened(place, tmp_path / "far", tiny_pair, spans=["own"], estimators=["paper"], kl=1000.0)
    held.measure()
    with refused("1000", "lower"):
        differences(held)


def test_an_estimator_that_refuses_is_left_out_with_its_reason(held_contest, tiny_pair, tmp_path, monkeypatch):
    _, _, place = held_contest
    held = opened(place, tmp_path, tiny_pair, spans=["own"], estimators=["attribution"])

    def refuse(self, source, shape):
        raise engine.SPDError("no such directions here")

    monkeypatch.setattr(type(estimators.get("attribution")), "estimate", refuse)
    held.measure()
    reached = entrants(held)
    assert reached[reached.estimator == "attribution"].note.item() == "no such directions here"
    assert "attribution" not in set(differences(held).estimator)


def difference(low, high, shown, **changes):
    row = {"place": "a", "model": "m", "task": "t", "estimator": "attribution", "span": "own", "rank": "0.5"}
    row |= {"outcome": "results_loss", "against": "random", "primary": True, "value": (low + high) / 2}
    return {**row, "low": low, "high": high, "shown": shown, **changes}


@pytest.mark.parametrize(
    "direction, low, high, shown, outcome",
    [
        ("lower", -0.4, -0.1, "lower", HELD), ("lower", 0.1, 0.4, "higher", FAILED), ("lower", -0.4, 0.1, "", OPEN),
        ("lower", -0.04, 0.04, "", FAILED), ("higher", 0.1, 0.4, "higher", HELD), ("same", -0.04, 0.04, "", HELD),
        ("same", -0.4, -0.1, "lower", FAILED), ("same", -0.4, 0.1, "", OPEN), ("higher", -0.1, 0.4, "", OPEN),
    ],
)  # fmt: skip
def test_a_prediction_holds_fails_or_stays_open(direction, low, high, shown, outcome):
    one = Prediction(claim="c", estimator="attribution", against="random", outcome="results_loss", direction=direction)
    (judged,) = one.judged(pd.DataFrame([difference(low, high, shown)]))
    assert (judged["outcome"], judged["of"]) == (outcome, f"1 {outcome}")


def test_a_prediction_of_several_differences_holds_where_all_do():
    one = Prediction(claim="c", estimator="attribution", against="random", outcome="results_loss", direction="lower")
    shown, unsure = difference(-0.4, -0.1, "lower"), difference(-0.4, 0.1, "", rank="16")
    table = pd.DataFrame([shown, unsure, {**shown, "place": "b"}, {**shown, "against": "paper"}])
    assert [(row["place"], row["outcome"]) for row in one.judged(table)] == [("a", OPEN), ("b", HELD)]
    narrowed = one.model_copy(update={"rank": 0.5})
    assert [row["outcome"] for row in narrowed.judged(table)] == [HELD, HELD]
    assert [row["of"] for row in one.model_copy(update={"span": "results"}).judged(table)][0].startswith("it was not")
    everything = everywhere(table)
    assert everything[["rank", "against", "shown", "places", "of"]].values.tolist() == [
        ["0.5", "random", "lower", 2, 2], ["16", "random", "", 0, 1], ["0.5", "paper", "lower", 1, 1]
    ]  # fmt: skip
    opposite = pd.DataFrame([shown, {**shown, "place": "b", "shown": "higher"}])
    assert everywhere(opposite).shown.item() == "both"


def test_bad_files_are_refused_in_a_sentence(tmp_path, settings):
    contest = written(tmp_path, "contest.yaml", {"estimators": ["paper"], "rank": [0.5]})
    with refused("unknown setting 'rank'"):
        Contest.read(contest)
    with refused("nonsense"):
        Contest.read(written(tmp_path, "contest.yaml", {"estimators": ["nonsense"]}))
    for rank in (0, 1.0, -0.5):
        with refused("rank", rank):
            Contest.read(written(tmp_path, "contest.yaml", {"ranks": [rank]}))
    for change, words in (({"outcome": "result_loss"}, "results_loss"), ({"against": "base"}, "against"),
                          ({"estimator": "nobody"}, "nobody")):  # fmt: skip
        wrong = {**PREDICTED, "predictions": [{**PREDICTED["predictions"][0], **change}]}
        with refused(words):
            Predictions.read(written(tmp_path, "predictions.yaml", wrong))
    with refused("written"):
        Predictions.read(written(tmp_path, "predictions.yaml", {"predictions": PREDICTED["predictions"]}))
    place = written(tmp_path, "tiny.yaml", settings)
    other = written(tmp_path, "other.yaml", {**settings, "task": "synthetic-qa"})
    with refused("synthetic-qa", "results"):  # before a model is loaded
        hold([place, other], written(tmp_path, "contest.yaml", ASKED), out=tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    with refused("--out"):
        open_places([place], None)
    with refused("'tiny'", "rename"):
        open_places([place, place], tmp_path)
    with refused("no such"):
        open_places([tmp_path / "no such"], tmp_path)
