"""Where a gain comes from: splits worked out by hand, additivity, effects against least squares, what is refused."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from spd_lens import tasks
from spd_lens.analysis.common.printed import TABLES
from spd_lens.analysis.gain.beside_paper import beside_paper
from spd_lens.analysis.gain.command import main
from spd_lens.analysis.gain.completions import COMPONENTS, FINAL, RATES, REFERENCE, completions, open_all
from spd_lens.analysis.gain.cutting import first_answer, first_program, goes_on
from spd_lens.analysis.gain.factorial import (
    FACTORS,
    cell_table,
    cells,
    constant,
    effect_table,
    effects,
    grid,
    projections,
)
from spd_lens.analysis.gain.figures import effect_figures, split_figures
from spd_lens.analysis.gain.split import PARTS, QUANTITIES, split
from spd_lens.evaluation.results import EvalResult, ItemResult
from spd_lens.files import read_json, write_json
from spd_lens.generation.corpus import settings_path
from spd_lens.stats import clustered_difference
from spd_lens.study.config import StudyConfig
from spd_lens.study.folder import Study
from tests.helpers import refused

MATH, QA, CODE = (tasks.get(f"synthetic-{name}") for name in ("math", "qa", "code"))
ITEMS = MATH.test(12, 42)


def stops(answer: str) -> str:
    return f"That makes {answer}.\n#### {answer}"


def runs_on(answer: str) -> str:
    """The last number is not the answer."""
    return f"{stops(answer)}\n\nQuestion: Tom has 991 apples and eats one. How many are left?"


def elsewhere(answer: str) -> str:
    """The answer is stated, and is not the last number."""
    return f"The answer is {answer}. It took me 991 steps."


def only_last(answer: str) -> str:
    """The stated answer is wrong, and the last number is right."""
    return f"The answer is 992. Or perhaps not; there is also {answer}"


def wrong(answer: str) -> str:
    return stops("993")


KINDS = {f.__name__: f for f in (stops, runs_on, elsewhere, only_last, wrong)}
WORKED = {  # under the last-number rule: score, rest, format, stopping
    "stops": (1, 1, 0, 0), "runs_on": (0, 1, 0, -1), "elsewhere": (0, 1, -1, 0), "only_last": (1, 0, 1, 0),
    "wrong": (0, 0, 0, 0),
}  # fmt: skip
PLAN: dict[str, list[list[str]]] = {
    "base": [["runs_on", "runs_on", "elsewhere", "stops"]],
    "psr": [["stops", "stops", "stops", "wrong"], ["runs_on", "stops", "stops", "stops"]],
    "spd": [["stops", "only_last", "stops", "stops"], ["stops", "only_last", "stops", "stops"]],
}
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": None}


def write_study(
    folder: Path,
    plan: dict[str, list[list[str]]] | None = None,
    *,
    scoring: str = REFERENCE,
    form: str = "raw",
    sampling: dict[str, dict[str, Any]] | None = None,
    task: tasks.Task = MATH,
    **settings: Any,
) -> Path:
    """A finished study whose completions are of the kinds that `plan[method][seed]` names, one an item."""
    plan = plan or PLAN
    n_items = len(plan["base"][0])
    seeds = list(range(1, 1 + max(map(len, plan.values()))))
    config = StudyConfig.make(
        {
            "methods": list(plan), "sources": [task.name], "seeds": seeds,
            "task_options": {task.name: {"scoring": scoring}},
            "settings": {"model": "some/model", "n_eval": n_items, "prompt_format": form, **settings},
        }
    )  # fmt: skip
    study = Study(folder)
    study.begin(config)
    own, items = task.scored_by(scoring), task.test(n_items, 42)
    for method, by_seed in plan.items():
        for seed, kinds in zip(seeds, by_seed, strict=False):
            cell = study.base() if method == "base" else study.cell(task.name, method, seed)
            texts = [
                KINDS[kind](item.meta["answer"]) if kind in KINDS else kind
                for kind, item in zip(kinds, items, strict=True)
            ]
            results = [
                ItemResult(
                    item.id, item.prompt, item.completion, text, None, own.score(item, text), len(text.split()),
                    "length" if kind == "runs_on" else "eos",
                )
                for kind, item, text in zip(kinds, items, texts, strict=True)
            ]  # fmt: skip
            EvalResult(method, task.name, results, {"prompt_format": form}).save(cell.result_path(task.name))
            if method != "base":
                cell.corpus_path.touch()
                drawn = {**SAMPLING, **(sampling or {}).get(method, {})}
                write_json(settings_path(cell.corpus_path), {"kind": "corpus", "settings": drawn, "order": []})
    return folder


def opened(*folders: Path, code: bool = False) -> list[Any]:
    return open_all(folders, None, code)


def found_of(frame: pd.DataFrame, **place: str) -> pd.Series:
    [(_, row)] = frame[(frame[list(place)] == pd.Series(place)).all(axis=1)].iterrows()
    return row


# one completion


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_completion_in_parts(kind: str, tmp_path: Path) -> None:
    frame = completions(opened(write_study(tmp_path, {"base": [[kind]], "psr": [["stops"]]})))
    row = found_of(frame, method="base", scorer=REFERENCE)
    assert tuple(row[["score", *COMPONENTS]]) == WORKED[kind]
    assert row.own and not found_of(frame, method="base", scorer=FINAL).own
    final = found_of(frame, method="base", scorer=FINAL)
    assert final.score == final.rest == WORKED[kind][1]
    assert (final["format"], final.stopping) == (0, 0)  # by construction
    assert (row["runs on"], row["cut at the limit"], row["ends by itself"]) == (
        (1, 1, 0) if kind == "runs_on" else (0, 0, 1)
    )
    assert row["answer found"] == 1
    assert row["asked form"] == float(kind in ("stops", "runs_on", "wrong"))


def test_the_part_before_the_next_question() -> None:
    assert first_answer(MATH, runs_on("5")).strip() == stops("5") and goes_on(MATH, runs_on("5"))
    assert first_answer(MATH, stops("5")) == stops("5") and not goes_on(MATH, stops("5"))
    assert first_answer(QA, " B\nQuestion: Which?\nA. 1\nAnswer: A").strip() == "B"
    assert not goes_on(MATH, "<think>Question: what? 5\nQuestion: again</think>\n#### 5")


PROGRAM = "def f(a):\n    # Question: is it\n    return a + 1"


@pytest.mark.parametrize(
    ("text", "cut", "on"),
    [
        (PROGRAM, PROGRAM, False),
        (f"```python\n{PROGRAM}\n```\nIt adds one.", f"```python\n{PROGRAM}\n```", False),
        (f"```sh\npip install x\n```\n```python\n{PROGRAM}\n```\nInstruction: Write g.\n```python\ndef g(): 1\n```",
         f"```sh\npip install x\n```\n```python\n{PROGRAM}\n```", True),
        (f" {PROGRAM}\n\nx = f(1)\nprint(x)\n\nInstruction: Write g.\nCode: def g(): pass",
         f" {PROGRAM}\n\nx = f(1)\nprint(x)\n\n", True),
        (f"{PROGRAM}\n\n@cache\ndef g():\n    pass\n\nThis adds one.", f"{PROGRAM}\n\n@cache\ndef g():\n    pass\n\n",
         False),
        ("I do not know.", "I do not know.", False),
        (f"<think>def no(): pass\n</think>{PROGRAM}\nDone, said he", f"{PROGRAM}\n", False),
        # as models go on behind a bare "Code:"
        (f" {PROGRAM}\n\nInstruction: Write g.\n```python\ndef g(): 1\n```", f" {PROGRAM}\n\n", True),
        (f" {PROGRAM}\n```\nInstruction: Write g.\nCode: def g(): 1", f" {PROGRAM}\n", True),
        (f" {PROGRAM}\n```\n\nIt adds.\n```python\nf(3)\n```", f" {PROGRAM}\n", False),
        (f" {PROGRAM}\n\n### Instruction:\nWrite g.\n\n### Response:\ndef g(): 1", f" {PROGRAM}\n\n", True),
        (f" {PROGRAM}\n\n# Question 2: Write g.\ndef g(): 1", f" {PROGRAM}\n\n", True),
        (f" {PROGRAM}\n\nHuman: Write g.\n\nAssistant: def g(): 1", f" {PROGRAM}\n\n", True),
        (f"```python\n{PROGRAM}\n\nInstruction: Write g.", f"```python\n{PROGRAM}\n\n", True),
        (" print(1)\n\nInstruction: Write g.\nCode: def g(): 1", " print(1)\n\n", True),
        (" SELECT 1;\n\nInstruction: Print 2.\nCode: print(2)", " SELECT 1;\n\n", True),
        (f"Instruction: Add one.\nCode:\n{PROGRAM}", f"Instruction: Add one.\nCode:\n{PROGRAM}", False),
        (f"Here it is.\nTask: add.\n{PROGRAM}\nprompt = input('Question: ')\n# in all, so",
         f"Here it is.\nTask: add.\n{PROGRAM}\nprompt = input('Question: ')\n# in all, so", False),
    ],
)  # fmt: skip
def test_the_first_program_of_a_text(text: str, cut: str, on: bool) -> None:
    assert first_program(text) == cut == first_answer(CODE, text)
    assert goes_on(CODE, text) == on
    assert first_program(cut) == cut


# the split


def test_the_split_worked_out_by_hand(tmp_path: Path) -> None:
    table = split(completions(opened(write_study(tmp_path))))
    own = table[table.own]
    by_hand = {  # base: 0 1 0 -1, 0 1 0 -1, 0 1 -1 0, 1 1 0 0; psr, spd as in PLAN, seeds averaged
        "psr": {"score": 0.5, "rest": -0.125, "format": 0.25, "stopping": 0.375},
        "spd": {"score": 0.75, "rest": -0.25, "format": 0.5, "stopping": 0.5},
    }
    for method, wanted in by_hand.items():
        gains = own[own.method == method].set_index("quantity").gain
        assert gains[list(PARTS)].to_dict() == pytest.approx(wanted)
    level = own[own.method == "base"].set_index("quantity").value
    assert level[["score", "rest", "format", "stopping"]].tolist() == [0.25, 1.0, -0.25, -0.5]
    assert level[list(RATES)].tolist() == [0.5, 0.5, 0.5, 1.0, 0.75]
    final = table[(table.scorer == FINAL) & (table.method == "spd")].set_index("quantity")
    assert final.gain[list(PARTS)].tolist() == [-0.25, -0.25, 0.0, 0.0]
    # nothing was estimated where it is 0 by construction
    assert final.loc[["format", "stopping"], ["gain_low", "gain_high"]].isna().all(axis=None)
    assert final.n_seeds.eq(2).all() and final.n.eq(4).all()


def random_plan(seed: int, n_items: int = 12) -> dict[str, list[list[str]]]:
    rng = np.random.default_rng(seed)
    return {
        method: rng.choice(list(KINDS), size=(1 if method == "base" else 3, n_items), p=p).tolist()
        for method, p in (("base", [0.2, 0.4, 0.2, 0.1, 0.1]), ("psr", [0.5, 0.1, 0.1, 0.1, 0.2]), ("spd", [0.2] * 5))
    }


@pytest.mark.parametrize("seed", range(3))
def test_components_add_up_and_agree_with_plain_sums(seed: int, tmp_path: Path) -> None:
    plan = random_plan(seed)
    frame = completions(opened(write_study(tmp_path, plan)))
    assert np.array_equal(frame[list(COMPONENTS)].sum(axis=1), frame.score)
    table = split(frame)
    for _, part in table[table.method != "base"].groupby(["scorer", "method"]):
        gain = part.set_index("quantity").gain
        assert gain["score"] == pytest.approx(gain[list(COMPONENTS)].sum(), abs=1e-12)
    for method in ("psr", "spd"):
        for place, name in enumerate(PARTS):  # without the package: the worked values of each kind
            mine = np.array([[WORKED[kind][place] for kind in kinds] for kinds in plan[method]], dtype=np.float64)
            base = np.array([[WORKED[kind][place] for kind in kinds] for kinds in plan["base"]], dtype=np.float64)
            row = found_of(table, scorer=REFERENCE, method=method, quantity=name)
            assert row.gain == pytest.approx(mine.mean() - base.mean(), abs=1e-12)
            by_id = np.argsort([item.id for item in ITEMS])  # the draws of a bootstrap depend on the order
            wanted = clustered_difference(base[:, by_id], mine[:, by_id], n_resamples=4999)
            assert (row.gain_low, row.gain_high) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_p_values_are_corrected_for_all_that_was_compared(tmp_path: Path) -> None:
    table = split(completions(opened(write_study(tmp_path, random_plan(0)))))
    family = table[table.p.notna()]
    # of two methods, all parts under the last-number rule; under the other, format and stopping are 0 by construction
    assert len(family) == 2 * (len(PARTS) + 2) and set(family.quantity) == set(PARTS)
    assert (family.p_holm >= family.p).all() and (family.p_holm > family.p).any()


# the factorial


def crossed(seed: int, factors: dict[str, tuple[str, ...]]) -> dict[tuple[str, ...], np.ndarray]:
    rng = np.random.default_rng(seed)
    return {levels: rng.normal(size=7) for levels in itertools.product(*factors.values())}


def test_effects_are_the_coefficients_of_a_saturated_model() -> None:
    factors = {name: (levels[0], levels[-1]) for name, levels in FACTORS.items()}
    by_item = crossed(0, factors)
    coded = np.array(
        [
            [-0.5 if x == low else 0.5 for x, (low, _) in zip(levels, factors.values(), strict=True)]
            for levels in by_item
        ]
    )
    subsets = [places for size in range(5) for places in itertools.combinations(range(4), size)]
    design = np.stack([coded[:, list(places)].prod(axis=1) for places in subsets], axis=1)
    coefficients = np.linalg.lstsq(design, np.stack(list(by_item.values())), rcond=None)[0]
    wanted = {tuple(list(factors)[i] for i in places): row for places, row in zip(subsets, coefficients, strict=True)}
    found = {effect.factors: effect for effect in effects(by_item)}
    assert set(found) == {names for names in wanted if len(names) in (1, 2)}
    for names, effect in found.items():
        np.testing.assert_allclose(effect.by_item, wanted[names], atol=1e-12)
        assert effect.contexts == 2 ** (4 - len(names))
        assert effect.pairs == tuple(factors[name] for name in names)


def test_only_settings_with_all_levels_count() -> None:
    by_item = crossed(1, {name: (levels[0], levels[-1]) for name, levels in FACTORS.items()})
    lost = ("on", "chat", FINAL, "spd")
    del by_item[lost]
    found = {effect.factors: effect for effect in effects(by_item)}
    contexts = [
        c for c in itertools.product(("verbatim", "chat"), (FINAL, REFERENCE), ("none", "spd")) if c != lost[1:]
    ]
    wanted = np.mean([by_item["on", *c] - by_item["off", *c] for c in contexts], axis=0)
    np.testing.assert_allclose(found["padding",].by_item, wanted, atol=1e-12)
    assert found["padding",].contexts == 7 and found["padding", "prompts"].contexts == 3
    # three levels: each pair of them
    three = crossed(2, {**{n: v[:1] for n, v in FACTORS.items()}, "projection": FACTORS["projection"]})
    assert [e.contrast for e in effects(three)] == ["random − none", "spd − none", "spd − random"]
    assert not list(effects({lost: np.zeros(3)}))
    assert constant({lost: 0}) == dict(zip(FACTORS, lost, strict=True))


def four_studies(folder: Path) -> list[Path]:
    made = []
    for number, (form, padded) in enumerate(itertools.product(("raw", "chat"), (False, True))):
        padding = {"loss_on_padding": padded, **({"max_length": 64} if padded else {})}
        plan = {**random_plan(number), "spd-random": random_plan(10 + number)["spd"]}
        plan["base"] = random_plan(40 + (form == "chat"))["base"]
        made.append(write_study(folder / f"study-{number}", plan, form=form, **padding))
    return made


def test_studies_are_crossed(tmp_path: Path) -> None:
    studies = opened(*four_studies(tmp_path))
    frame, points = completions(studies), grid(studies)
    found = cells(frame, points)
    [(place, tables)] = found.items()
    assert place == ("synthetic-math", "synthetic-math") and len(tables) == 2 * 2 * 2 * 3
    table = cell_table(found)
    chosen = {"padding": "on", "prompts": "chat", "scorer": REFERENCE, "projection": "random", "outcome": "gain"}
    row = found_of(table, **chosen)
    own = frame[(frame.study == "study-3") & (frame.scorer == REFERENCE)].groupby("method").score.mean()
    assert row.value == pytest.approx(own["spd-random"] - own["base"]) and (row.n, row.n_seeds) == (12, 3)
    assert found_of(table, **{**chosen, "outcome": "score"}).value == pytest.approx(own["spd-random"])
    effect = effect_table(found)
    # the interaction of padding and scorer, from means of cells
    mean = table[table.outcome == "gain"].groupby(["padding", "scorer"]).value.mean()
    wanted = (mean["on", REFERENCE] - mean["off", REFERENCE]) - (mean["on", FINAL] - mean["off", FINAL])
    row = found_of(effect, outcome="gain", effect="padding × scorer")
    assert row.value == pytest.approx(wanted, abs=1e-12) and row.contexts == 6 and row.low < row.value < row.high
    assert row.contrast == "on − off; reference − final"
    # how a completion ends does not depend on who scores it
    assert not effect[effect.outcome.isin(["ends by itself", "tokens"])].effect.str.contains("scorer").any()
    gains = effect[effect.outcome == "gain"]
    assert gains.value.abs().is_monotonic_decreasing and gains.p_holm.notna().all()
    assert effect[effect.outcome != "gain"].p_holm.isna().all()


def test_one_study_shows_what_varies_in_it(tmp_path: Path) -> None:
    studies = opened(write_study(tmp_path))
    found = cells(completions(studies), grid(studies))
    assert set(effect_table(found).effect) == {"scorer", "projection", "scorer × projection"}
    assert constant(next(iter(found.values()))) == {"padding": "off", "prompts": "raw"}


def test_no_projection_is_a_method_that_samples_as_spd_does(tmp_path: Path) -> None:
    plan = {**PLAN, "ssd": PLAN["psr"]}
    [one] = opened(write_study(tmp_path / "a", plan))
    assert projections(one, "synthetic-math") == {"psr": "none", "spd": "spd"}
    [one] = opened(write_study(tmp_path / "b", plan, sampling={"psr": {"top_p": 1.0}}))
    assert projections(one, "synthetic-math") == {"ssd": "none", "spd": "spd"}
    [one] = opened(write_study(tmp_path / "c", plan, sampling={"spd": {"temperature": 0.1}}))
    assert projections(one, "synthetic-math") == {"spd": "spd"}


# the paper's numbers


def test_gains_stand_beside_the_papers(tmp_path: Path) -> None:
    table = split(completions(opened(write_study(tmp_path))))
    table = table.assign(source="gsm8k", target="svamp")  # as if it had been measured there
    found = beside_paper(table, "Qwen2.5-0.5B-Instruct")
    assert list(found.method) == ["psr", "spd"] * 2 and set(found.target) == {"SVAMP"}
    row = found[(found.method == "spd") & found.own].iloc[0]
    assert (row.paper_base, row.paper_gain, row.base, row.gain) == (16.0, 16.0, 25.0, 75.0)
    assert row.rest + row["format"] + row.stopping == pytest.approx(row.gain)
    assert beside_paper(table.assign(source="mmlu"), "Qwen2.5-0.5B-Instruct").empty
    renamed = table.assign(method=table.method.replace("psr", "psr-reference"))
    assert list(beside_paper(renamed, "Qwen2.5-0.5B-Instruct").method) == ["psr-reference", "spd"] * 2
    assert {r.method for r in TABLES[1].rows} >= {"base", "psr", "ssd", "spd"}


# the command


def test_the_command_writes_report_tables_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = four_studies(tmp_path)
    main(folders, beside="Qwen2.5-7B-Instruct", quiet=True)
    out = " ".join(capsys.readouterr().out.split())
    assert "Change of the score over the base model" in out and "gain.md" in out
    written = folders[0] / "gain"
    assert {path.name for path in written.iterdir()} == {
        "gain.md", "gain.csv", "factorial.csv", "effects.csv", "gain.html"
    }  # fmt: skip
    text = (written / "gain.md").read_text(encoding="utf-8")
    assert "## study-2: synthetic-math → synthetic-math" in text
    assert "mix with it: max_length (None, 64, None, 64)" in text
    gains = pd.read_csv(written / "gain.csv")
    assert set(gains.quantity) == set(QUANTITIES) and len(gains) == 4 * 2 * 4 * len(QUANTITIES)
    assert len(pd.read_csv(written / "factorial.csv")) == 24 * 4
    html = (written / "gain.html").read_text(encoding="utf-8")
    assert "corrected p of the four" in html and not re.search(r"<script[^>]+src=", html)
    assert "Table" not in text  # no target of the paper was measured


def test_figures_have_a_bar_for_each_component_and_a_panel_for_each_target(tmp_path: Path) -> None:
    studies = opened(*four_studies(tmp_path))
    frame = completions(studies)
    table = split(frame)
    figures = list(split_figures(table))
    assert len(figures) == 4 * 2
    assert len(list(split_figures(table.assign(own=table.scorer == FINAL)))) == 4 * 2 * 2
    stack = figures[0]
    assert [trace.type for trace in stack.data] == ["bar"] * 3 + ["scatter"] and stack.layout.barmode == "relative"
    total = np.sum([trace.y for trace in stack.data[:3]], axis=0)
    np.testing.assert_allclose(total, stack.data[3].y, atol=1e-9)
    drawn = list(effect_figures(effect_table(cells(frame, grid(studies)))))
    assert [len(fig.data) for fig in drawn] == [1, 1, 1]
    assert len(drawn[0].data[0].x) == 18  # 6 main effects, 12 interactions


def test_programs_are_not_run_unasked(tmp_path: Path) -> None:
    gold = [item.completion for item in CODE.test(2, 42)]
    folder = write_study(tmp_path / "code", {"base": [["no", gold[1]]], "psr": [gold]}, scoring=FINAL, task=RUN)
    with refused("scores programs that a model wrote", "--allow-code-execution"):
        opened(folder)
    [one] = opened(folder, code=True)
    frame = completions([one])
    assert frame[(frame.method == "psr") & (frame.scorer == FINAL)].score.tolist() == [1, 1]


RUN = tasks.get("synthetic-code", executor=lambda code, tests, setup: code.strip() != "no")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda one, two: shutil.rmtree(two), ("is not a study",)),
        (lambda one, two: (two / "study.yaml").unlink(), ("is not a study",)),
        (lambda one, two: (two / "synthetic-math/spd/2/eval/synthetic-math.json").unlink(),
         ("is not finished: spd on synthetic-math, seed 2 has no scored completions",)),
        (lambda one, two: (shutil.rmtree(two), write_study(two, model="another/model")),
         ("some/model", "another/model", "one model")),
        (lambda one, two: (shutil.rmtree(two), write_study(two, random_plan(0))), ("different items", "4 in common")),
        (lambda one, two: None, ("are one point of the factorial", "leave one of them out")),
        (lambda one, two: [(p / "study.json").write_text(json.dumps({"weights": p.name})) for p in (one, two)],
         ("other weights under that name",)),
    ],
)  # fmt: skip
def test_studies_that_do_not_belong_together_are_refused(change: Any, says: tuple[str, ...], tmp_path: Path) -> None:
    folders = [write_study(tmp_path / name) for name in ("one", "two")]
    change(*folders)
    with refused(*says):
        main(folders, quiet=True)
    assert not (folders[0] / "gain").exists()


def test_other_mistakes_are_refused(tmp_path: Path) -> None:
    with refused("trains no method"):
        main([write_study(tmp_path / "base", {"base": [["stops"]]})], quiet=True)
    folder = write_study(tmp_path / "one")
    with refused("named twice"):
        main([folder, tmp_path / "." / "one"], quiet=True)
    with refused("the paper has no model 'gpt-2'", "Qwen2.5-0.5B-Instruct"):
        main([folder], beside="gpt-2", quiet=True)
    path = folder / "base/eval/synthetic-math.json"
    record = read_json(path)
    record["items"][0]["gold"] = "something else"
    write_json(path, record)
    with refused("the data of synthetic-math are not those that one was evaluated on", "reads otherwise", "--data-dir"):
        main([folder], quiet=True)


def test_scores_by_other_rules_than_todays_are_counted(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "one")
    path = folder / "base/eval/synthetic-math.json"
    record = read_json(path)
    record["items"][0]["score"] = 1.0  # it runs on, and scores 0
    write_json(path, record)
    main([folder], quiet=True)
    assert "1 completions are scored otherwise by today's rules" in (folder / "gain" / "gain.md").read_text()
