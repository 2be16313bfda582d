"""A study's report: its numbers against plain recomputation, planted effects and nulls, what is missing or claimed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from spd_lens.errors import SPDError
from spd_lens.evaluation import SAYS, Format
from spd_lens.study import engine
from spd_lens.study.folder import Study
from spd_lens.study.reporting import report
from spd_lens.study.reporting.differences import RANDOM, better, differences, estimate_of, means, references
from spd_lens.study.reporting.evidence import Evidence
from spd_lens.study.reporting.published import base_and_published, base_warnings
from spd_lens.study.reporting.report import Report, write_report
from spd_lens.study.reporting.setup import backbone, differences_from_paper
from spd_lens.study.reporting.verdict import Answer, answers
from tests.helpers import publish
from tests.studies import planted, write_study

MATH = "synthetic-math"


def _answers(results: pd.DataFrame, **plan: object) -> list[Answer]:
    evidence = Evidence.of(results, plan)
    return answers(evidence, differences(evidence, n_resamples=999, min_flips=1999))[evidence.sources[0]]


def _one(table: pd.DataFrame, **where: str) -> pd.Series:
    for column, value in where.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


# numbers


def test_numbers_are_those_of_a_plain_recomputation() -> None:
    results = planted({("spd", "aligned loss"): -0.05}, targets=(MATH,), n_items=24, seed=5)
    evidence = Evidence.of(results)
    table, averages = differences(evidence), means(evidence)

    def values(method: str, measure: str) -> pd.Series:
        rows = results[(results.method == method) & (results.measure == measure)]
        return rows.groupby("item").value.mean().sort_index()

    for measure in ("aligned loss", "KL from base", "accuracy"):
        row = _one(table, method="spd", reference=RANDOM, measure=measure)
        difference = values("spd", measure) - values(RANDOM, measure)
        assert row.value == pytest.approx(difference.mean(), abs=1e-12)
        # the interval is that of a bootstrap of the mean of these differences
        spread = difference.std(ddof=1) / np.sqrt(len(difference))
        assert row.high - row.low == pytest.approx(2 * 1.96 * spread, rel=0.2)
        if measure != "accuracy":  # whose few values tie, which the t-test does not know
            assert row.p == pytest.approx(stats.ttest_1samp(difference, 0).pvalue, abs=0.06)
        assert _one(averages, method="spd", measure=measure).value == pytest.approx(values("spd", measure).mean())
    primary = table[table.family == "primary"]
    ordered = primary.sort_values("p")
    by_hand = np.minimum(1, np.maximum.accumulate(ordered.p.to_numpy() * np.arange(len(ordered), 0, -1)))
    assert ordered.p_holm.to_numpy() == pytest.approx(by_hand)


def test_families_and_what_is_compared() -> None:
    results = planted(targets=(MATH,), side_effects=("neutral",), n_items=12)
    of_base = results[(results.method == "base") & (results.measure == "aligned loss")]
    results = pd.concat([results, of_base.assign(measure="KL from base", value=0.0)])  # nothing that could be tested
    table = differences(Evidence.of(results), n_resamples=200, min_flips=199)
    primary = table[table.family == "primary"]
    assert set(primary.measure) == {"aligned loss", "KL from base"}
    assert set(primary.role) == {"target"}
    assert not ((table.measure == "KL from base") & (table.reference == "base")).any()
    pairs = set(primary[["method", "reference"]].itertuples(index=False, name=None))
    assert pairs == {
        ("psr", "base"), ("ssd", "base"), ("spd", "base"), ("spd-random", "base"),
        ("psr", RANDOM), ("ssd", RANDOM), ("spd", RANDOM), ("spd", "psr"), ("spd", "ssd"),
    }  # fmt: skip
    assert len(primary) == 9 + 5  # aligned loss for all, KL for those without the base
    assert references("base", ["base", "spd"]) == []
    assert [better("aligned loss", "lower"), better("accuracy", "lower"), better("KL from base", "lower")] == [
        "better", "worse", "",
    ]  # fmt: skip


def test_range_over_seeds_and_a_claim_needs_every_seed() -> None:
    results = planted(targets=(MATH,), seeds=(1, 2), measures=("aligned loss",), n_items=40, seed=1)
    spd = results.method == "spd"
    results.loc[spd & (results.seed == 1), "value"] -= 0.6
    results.loc[spd & (results.seed == 2), "value"] += 0.2
    row = _one(differences(Evidence.of(results)), method="spd", reference="base")
    base = results[results.method == "base"].value.mean()
    by_seed = [results[spd & (results.seed == s)].value.mean() - base for s in (1, 2)]
    assert [row.seeds_low, row.seeds_high] == pytest.approx(by_seed)
    assert row.p_holm < 0.01
    assert row.high < 0
    assert row.verdict == "not in every seed"
    assert "not measurably" in _answers(results)[0].headline.lower()


def test_other_order_and_other_seeds_are_paired_by_item() -> None:
    results = planted({("spd", "aligned loss"): -0.2}, targets=(MATH,), measures=("aligned loss",), n_items=20)
    shuffled = results.sample(frac=1, random_state=0)
    one, other = (differences(Evidence.of(r), n_resamples=200) for r in (results, shuffled))
    key = ["method", "reference"]
    assert one.set_index(key).value.sort_index().to_numpy() == pytest.approx(
        other.set_index(key).value.sort_index().to_numpy(), abs=1e-12
    )
    renumbered = results.assign(seed=[float(s) if s != "" else s for s in results.seed])  # as a CSV may have them
    assert Evidence.of(renumbered).seeds == ["1", "2", "3"]


@pytest.mark.parametrize(("n_items", "enough"), [(1, False), (6, False), (10, True)])
def test_few_items_are_too_few(n_items: int, enough: bool) -> None:
    """Nine comparisons: six items that all agree have p = 2/64, which no correction survives; ten have 2/1024."""
    results = planted({("spd", "aligned loss"): -9}, targets=(MATH,), measures=("aligned loss",), n_items=n_items)
    table = differences(Evidence.of(results))
    assert ("too few items" in set(table.verdict)) != enough
    assert (_one(table, method="spd", reference="base").verdict == "lower") == enough
    assert set(table.verdict) == {"lower", "within noise"} if enough else {"too few items"}


def test_too_few_texts_are_not_called_harmless() -> None:
    results = planted({("spd", "completion loss"): 9}, side_effects=("neutral",), n_items=16)
    few = results[(results.role != "side effect") | results.item.isin([f"neutral-{i}" for i in range(6)])]
    details = _answers(few)[0].details
    assert any("Side effects: 1 of 1 measures have too few texts to show anything" in d for d in details)
    assert not any("nothing that was measured got worse" in d for d in details)
    assert any("worse than the base model: completion loss on neutral" in d for d in _answers(results)[0].details)


# error rates


def test_planted_null_stays_quiet() -> None:
    """Family-wise: at most 5 % of studies without any effect claim one, within what chance allows for 60 studies."""
    n, claims, corrected, raw = 60, 0, 0, 0
    for seed in range(n):
        results = planted(
            targets=(MATH,), seeds=(1, 2), n_items=14, measures=("aligned loss", "KL from base"), seed=seed
        )
        table = differences(Evidence.of(results), n_resamples=100, min_flips=999)
        primary = table[table.family == "primary"]
        claims += primary.verdict.isin(["higher", "lower"]).any()
        corrected += (primary.p_holm <= 0.05).any()
        raw += (primary.p <= 0.05).any()
    low, high = stats.binom.ppf([0.001, 0.999], n, 0.05)
    assert claims <= corrected <= high
    assert corrected >= low
    assert raw > 1.5 * high  # without the correction, it would not have been quiet


def test_planted_effect_is_found_as_often_as_its_size_says() -> None:
    n, n_items, effect, noise = 40, 24, -0.1, 0.1
    found = 0
    for seed in range(n):
        results = planted(
            {("spd", "aligned loss"): effect}, targets=(MATH,), seeds=(1,), n_items=n_items, noise=noise,
            measures=("aligned loss",), methods=("base", "psr", "spd", "spd-random"), seed=1000 + seed,
        )  # fmt: skip
        table = differences(Evidence.of(results), n_resamples=200, min_flips=1999)
        found += _one(table, method="spd", reference="base").verdict == "lower"
    # one seed: item noise and half of it again, so that the noise of a difference to the base is known
    shift = abs(effect) / (noise * np.sqrt(1 + 0.25)) * np.sqrt(n_items)

    def power(level: float) -> float:
        limit = stats.t.ppf(1 - level / 2, n_items - 1)
        return float(stats.nct.sf(limit, n_items - 1, shift))

    m = len(table)
    low, high = stats.binom.ppf(0.001, n, power(0.05 / m)), stats.binom.ppf(0.999, n, power(0.05))
    assert low <= found <= high
    assert power(0.05 / m) > 0.8


# what is claimed


def test_answers_to_a_planted_gain() -> None:
    helped, subspace = _answers(planted({("spd", "aligned loss"): -0.3}, phases=("trained", "projected")))
    assert helped.headline == "By aligned loss yes."
    assert "aligned loss lower on synthetic-math (" in helped.details[0]
    assert any(detail.startswith("Against psr: aligned loss lower") for detail in helped.details)
    assert subspace.headline.count("bring a gain that random ones do not") == 2


MARKED = ("aligned loss", "copied-answer loss", "results loss", "KL from base", "accuracy")
"""What is measured where the gold solutions have values to compute."""


def test_a_gain_that_copying_explains_is_no_help() -> None:
    copied = {("spd", measure): -0.3 for measure in ("aligned loss", "copied-answer loss")}
    helped, subspace = _answers(planted(copied, measures=MARKED))
    assert helped.headline.startswith("Not measurably: by results loss it is not told apart")
    assert "results loss within noise on synthetic-math" in helped.details[0]
    for measure in ("aligned loss", "copied-answer loss"):
        beside = f"Beside it, against the base model: {measure} lower on synthetic-math"
        assert any(detail.startswith(beside) for detail in helped.details)
    assert "nothing sets the gradients' directions apart" in subspace.headline


def test_a_gain_on_results_is_told_with_accuracy() -> None:
    results = planted({("spd", "results loss"): -0.3}, measures=MARKED)
    helped, subspace = _answers(results)
    assert helped.headline == (
        "By results loss yes. Not measurably: by accuracy it is not told apart from the base model."
    )
    assert "bring a gain that random ones do not" in subspace.headline
    only_one = results[(results.measure != "results loss") | (results.target == MATH)]
    assert _answers(only_one)[0].headline.startswith("By results loss and aligned loss yes, on synthetic-math (1 of 2")
    table = differences(Evidence.of(results), n_resamples=200, min_flips=199)
    assert set(table[table.family == "primary"].measure) == {"aligned loss", "results loss", "KL from base"}
    text = Report(Evidence.of(results)).text
    assert "(aligned loss and results loss and KL from base, on targets)" in text
    assert f"- Results loss: {SAYS['results_loss']}" in text and SAYS["answer_only_loss"] not in text


def test_answers_to_a_planted_null() -> None:
    helped, subspace = _answers(planted(seed=3, phases=("trained", "projected")))
    assert helped.headline.startswith("Not measurably")
    assert "nothing sets the gradients' directions apart" in subspace.headline
    assert "intervals exclude differences beyond" in subspace.headline


@pytest.mark.parametrize("plain", [("psr", "ssd"), ("psr-reference", "ssd-reference")])
def test_gain_of_any_retraining_is_not_spds(plain: tuple[str, str]) -> None:
    effects = {(m, "aligned loss"): -0.3 for m in (*plain, "spd", "spd-random")}
    helped, subspace = _answers(planted(effects, methods=("base", *plain, "spd", "spd-random"), seed=1))
    assert f"yes. But no more than {plain[0]} and {plain[1]} did" in helped.headline
    assert "nothing sets the gradients' directions apart" in subspace.headline


def test_less_harm_is_no_gain() -> None:
    _, subspace = _answers(planted({("spd-random", "aligned loss"): 0.3}))
    assert "less harm, no gain" in subspace.headline
    assert "Under the projection, before training: aligned loss was not measured" in subspace.headline


def test_a_difference_that_one_seed_lacks_is_neither_claimed_nor_denied() -> None:
    results = planted(targets=(MATH,), seeds=(1, 2), n_items=40, seed=1)
    chosen = (results.method == "spd") & (results.measure == "aligned loss")
    results.loc[chosen & (results.seed == 1), "value"] -= 0.6
    results.loc[chosen & (results.seed == 2), "value"] += 0.2
    headline = _answers(results)[1].headline
    assert "on synthetic-math there is a difference to random ones, but not in every seed" in headline
    assert "nothing sets" not in headline


def test_harm_is_said() -> None:
    results = planted({("spd", "aligned loss"): 0.3, ("spd", "completion loss"): 0.4}, side_effects=("neutral",))
    helped, subspace = _answers(results)
    assert helped.headline == "By aligned loss no: it did harm on synthetic-math and svamp."
    assert "random directions did better" in subspace.headline
    assert any(
        d.startswith("Side effects, worse than the base model: completion loss on neutral") for d in helped.details
    )


def test_mixed_targets() -> None:
    results = planted({("spd", "aligned loss"): -0.3}, seed=2)
    moved = (results.method == "spd") & (results.target == "svamp") & (results.measure == "aligned loss")
    results.loc[moved, "value"] += 0.6
    assert _answers(results)[0].headline == "By aligned loss it did on synthetic-math and did harm on svamp."


def test_controls_that_do_as_well_are_named() -> None:
    methods = ("base", "spd", "spd-random", "spd-shuffled", "spd-complement")
    effects = {("spd", "aligned loss"): -0.3, ("spd-shuffled", "aligned loss"): -0.3}
    _, subspace = _answers(planted(effects, methods=methods))
    assert subspace.details[-1].endswith("SPD is better than spd-complement, not told apart from spd-shuffled.")


def test_questions_that_a_study_cannot_answer() -> None:
    without_random = planted(methods=("base", "psr", "spd"))
    assert "cannot say: it has no 'spd-random'" in _answers(without_random)[1].headline
    assert "no method 'spd'" in _answers(planted(methods=("base", "psr")))[0].headline
    results = planted()
    unfinished = results[results.method != "spd"]
    found = _answers(unfinished, methods=["base", "psr", "ssd", "spd", "spd-random"])
    assert found[0].headline.startswith("Not answered")


# the document


def test_report_shows_the_numbers_and_gains_beside_side_effects(tmp_path: Path) -> None:
    results = planted(
        {("spd", "aligned loss"): -0.2, ("spd", "completion loss"): 0.3}, side_effects=("neutral",),
        phases=("trained", "projected"), n_items=20,
        measures=("aligned loss", "KL from base", "accuracy", "token accuracy", "format", "tokens"),
    )  # fmt: skip
    folder = write_study(tmp_path / "study", results)
    text = write_report(folder).text
    assert (folder / "report.md").read_text(encoding="utf-8") == text
    assert "not complete" not in text
    table = pd.read_csv(folder / "comparisons.csv")
    trained = table[table.phase == "trained"]
    start = text.index("## After training")
    overview = text[start : text.index("### Against", start)]
    for place in ({"target": "svamp", "measure": "aligned loss"}, {"target": "neutral", "measure": "completion loss"}):
        row = _one(trained, method="spd", reference="base", **place)
        assert str(estimate_of(row)).rsplit(" (", 1)[0] in overview  # both in one table
    row = _one(trained, method="spd", reference=RANDOM, measure="aligned loss", target=MATH)
    line = next(
        line for line in text[start:].splitlines() if "spd − spd-random" in line and line.startswith("| aligned")
    )
    assert f"| {row.p:.2g} | {row.p_holm:.2g} | **lower** (better) |" in line
    primary, accuracy = (overview.index(f"| {name}, `svamp`") for name in ("KL from base", "accuracy"))
    assert primary < accuracy < overview.index("*(side effect)*") < overview.index("length, `svamp`")
    assert text.index("## After training") < text.index("## Under the projection")
    assert "## Corpora that were trained on" in text
    assert "| psr | 82 (±1) | 0 |" in text
    n = (table.family == "primary").sum()
    assert f"over {n} comparisons of the primary outcomes" in text


def test_report_and_page_come_from_one_computation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(name: str) -> Callable[[Evidence], pd.DataFrame]:
        function = getattr(report, name)

        def call(evidence: Evidence) -> pd.DataFrame:
            made.append(name)
            return function(evidence)

        return call

    for name in ("means", "differences"):
        monkeypatch.setattr(report, name, counted(name))
    folder = write_study(tmp_path / "study", planted(targets=(MATH,), n_items=6, measures=("aligned loss",)))
    engine._report(Study(folder))
    assert sorted(made) == ["differences", "means"]
    assert all((folder / name).exists() for name in ("report.md", "comparisons.csv", "report.html"))


def test_unfinished_study_says_what_it_lacks(tmp_path: Path) -> None:
    results = planted(n_items=12, side_effects=("neutral",))
    gone = (results.method == "ssd") | ((results.method == "psr") & (results.seed == 2))
    gone |= (results.method == "spd") & (results.seed == 3) & (results.target == "svamp")
    gone |= (results.method == "spd-random") & (results.measure == "accuracy") & (results.target == "svamp")
    gone |= (results.method == "psr") & (results.role == "side effect")
    plan = {"methods": ["base", "psr", "ssd", "spd", "spd-random"]}
    text = write_report(write_study(tmp_path / "study", results[~gone], **plan)).text
    for sentence in (
        "- ssd from synthetic-math has no results.",
        "- psr from synthetic-math, seed 2, has no results.",
        "- spd from synthetic-math, seed 3, has no results on svamp.",
        "- spd-random from synthetic-math has no accuracy on svamp.",
        "- psr from synthetic-math has no side effects measured.",
        "- spd from synthetic-math has no results under its projection, before training.",
    ):
        assert sentence in text
    assert "This study is not complete" in text
    assert "| psr (2 of 3 seeds) |" in text
    assert "- base has" not in text


def test_a_target_that_is_planned_and_not_there(tmp_path: Path) -> None:
    results = planted(n_items=12, targets=(MATH,))
    folder = write_study(tmp_path / "study", results, targets=[MATH, "svamp", "own/data.jsonl"], sources=[MATH, "mmlu"])
    text = write_report(folder).text
    assert "- base has no results on svamp, data." in text
    assert "- spd from mmlu has no results." in text
    assert "Not answered: there are no results of spd after training on mmlu yet." in text


def test_items_left_out_are_counted() -> None:
    results = planted(targets=(MATH,), n_items=12, measures=("aligned loss",))
    gone = (results.method == "spd") & (results.seed == 2) & results.item.isin([f"{MATH}-3", f"{MATH}-4"])
    evidence = Evidence.of(results[~gone])
    table = differences(evidence)
    row = _one(table, method="spd", reference="base")
    assert (row.n, row.n_dropped) == (10, 2)
    assert "leave out items that a method or a seed lacks, at most 2" in Report(evidence).text


def test_infinite_losses_do_not_vanish() -> None:
    results = planted(targets=(MATH,), n_items=12, measures=("aligned loss",))
    worst = results.index[(results.method == "spd") & (results.seed == 1)][:2]
    results.loc[worst, "value"] = np.inf
    assert "spd has 2 infinite values of aligned loss on synthetic-math, left out" in Evidence.of(results).missing()


def test_names_from_data_cannot_break_the_page(tmp_path: Path) -> None:
    evil = "a|b<img src=x>"
    text = write_report(write_study(tmp_path / "study", planted(targets=(evil,), n_items=10))).text
    rows = [line for line in text.splitlines() if line.startswith("| aligned loss")]
    assert rows
    assert all("`a\\|b<img src=x>`" in row for row in rows)
    assert "<img" not in text.replace("`a\\|b<img src=x>`", "")  # outside of code spans


# set-up


def test_what_differs_from_the_paper() -> None:
    plan = {
        "sources": ["gsm8k"], "targets": ["gsm8k", "svamp"], "seeds": [42], "methods": ["base"],
        "settings": {"model": "Qwen/Qwen2.5-0.5B-Instruct", "n_train": 7473, "n_eval": {"gsm8k": 100, "svamp": 50}},
        "source_settings": {"gsm8k": {"n_calibration": 20}},
    }  # fmt: skip
    rows = differences_from_paper(Evidence.of(planted(targets=("gsm8k",), sources=(), n_items=2), plan))
    assert [row for row in rows if row[1] != "not stated"] == [
        ("n_calibration of gsm8k", "50", "20"), ("test items of svamp", "100", "50"),
    ]  # fmt: skip
    plan["settings"] = {"model": "SmolLM2", "rank": 16, "lr": 1e-4, "n_train": 7473}
    rows = differences_from_paper(Evidence.of(planted(targets=("gsm8k",), sources=(), n_items=2), plan))
    assert ("model", "five models of 0.5B to 14B", "SmolLM2") in rows
    assert ("rank", "0.5", "16") in rows
    assert ("lr", "1e-05", "0.0001") in rows
    assert not [row for row in rows if row[0] in ("prompt_template", "order", "scoring")]
    plan["settings"]["protocol"] = "reference"
    plan["task_options"] = {"svamp": {"scoring": "final"}}
    rows = differences_from_paper(Evidence.of(planted(targets=("gsm8k",), sources=(), n_items=2), plan))
    assert rows[-3:] == [
        ("prompt_template", "not stated", "reference (gsm8k, svamp)"),
        ("order", "not stated", "file (gsm8k, svamp)"),
        ("scoring", "not stated", "reference (gsm8k)"),
    ]


def test_backbones_by_name() -> None:
    assert backbone("unsloth/Qwen2.5-7B-Instruct") == "Qwen2.5-7B-Instruct"
    assert backbone("Qwen/Qwen3-4B-Instruct-2507") == "Qwen3-4B-Instruct"
    assert backbone("meta-llama/Llama-3.1-8B") is None


# what is published of the base


def _of_a_known_model(**settings: object) -> Evidence:
    results = planted(targets=("gsm8k", "svamp", "codealpaca"), n_items=40, measures=("accuracy", "completion loss"))
    base = (results.method == "base") & (results.measure == "accuracy")
    results.loc[base, "value"] = (np.arange(base.sum()) % 40 < 4).astype(float)  # 4 of 40 on every target
    plan = {
        "settings": {"model": "x/known", "prompt_format": "auto", **settings},
        "targets": ["gsm8k", "own/svamp.jsonl"],
        "task_options": {"gsm8k": {"scoring": "reference", "prompt_template": "reference"}},
    }
    return Evidence.of(results, plan, facts={"resolved": {"format": "verbatim"}})


def test_a_study_shows_its_base_beside_what_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Format(0, "reference", "reference")
    publish(monkeypatch, {
        ("Known", "gsm8k"): [(49.6, Format(4, "chat")), (11.0, reference)], ("Known", "svamp"): [(90.0, reference)],
        ("Known", "codealpaca"): [(0.683, reference)],
    })  # fmt: skip
    evidence = _of_a_known_model()
    text = Report(evidence).text
    section = text[text.index("## The base model, and what is published of it") :].partition("\n## ")[0]
    assert text.index("## What it says") < text.index(section) < text.index("## After training")
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    first = next(line for line in rows if "**here**" in line)
    assert first.startswith("| **10.0 [")
    assert "zero-shot, the reference code's prompt, the reference code's scoring" in first
    assert rows[3].startswith("| 11 | ") and "the same format" in rows[3]  # before 49.6
    assert rows[4].startswith("| 49.6 | 4-shot, chat prompt |")
    assert "on codealpaca" in section and "| 0.683 |" in section
    assert "svamp" not in section  # a file of one's own, whatever its name
    [sentence] = base_warnings(evidence)
    assert (
        sentence.startswith("gsm8k: The base scores 10.0 [") and "49.6 % is published (4-shot, chat prompt)" in sentence
    )
    assert sentence.removeprefix("gsm8k: ") in section


def test_the_format_of_a_study_is_its_protocols(monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, {("Known", "gsm8k"): [(11.0, Format(0, "reference", "reference"))]})
    evidence = _of_a_known_model(protocol="reference")
    for own, same in ({}, True), ({"gsm8k": {"scoring": "final"}}, False):
        found = replace(evidence, plan={**evidence.plan, "task_options": own})
        assert ("the same format" in base_and_published(found)) is same


def test_a_study_of_an_unknown_model_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, {("Known", "gsm8k"): [(49.6, Format(4, "chat"))]})
    for evidence in (_of_a_known_model(model="some/dir"), Evidence.of(planted(targets=("gsm8k",), n_items=4))):
        assert base_and_published(evidence) == "" and base_warnings(evidence) == []
        assert "published" not in Report(evidence).text
    assert "published of Known" in base_and_published(_of_a_known_model(model="some/dir", published_name="known"))
    by_files = replace(_of_a_known_model(model="some/dir"), facts={"published_name": "Known"})
    assert base_and_published(by_files).count("what its own files say") == 1


# bad input


def test_folders_that_are_no_study(tmp_path: Path) -> None:
    with pytest.raises(SPDError, match=r"has no results\.csv"):
        write_report(tmp_path)
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SPDError, match="no column 'source'"):
        write_report(tmp_path)
    folder = write_study(tmp_path / "study", planted(targets=(MATH,), n_items=3))
    (folder / "study.yaml").write_text("- a\n")
    with pytest.raises(SPDError, match="must hold 'setting: value' lines"):
        write_report(folder)


def test_an_item_twice_is_refused() -> None:
    results = planted(targets=(MATH,), n_items=3)
    with pytest.raises(SPDError, match=r"item synthetic-math-0 of synthetic-math twice for base \(aligned loss\)"):
        Evidence.of(pd.concat([results, results.head(1)]))
