"""Texts beyond the context: refused with the way out named, or left out whole and counted; never cut."""

import json
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from typer.testing import CliRunner

import spd_lens as spd
from spd_lens.analysis.calibration import size as calibration_size
from spd_lens.analysis.common.subject import Subject
from spd_lens.cli.commands import app
from spd_lens.evaluation.evaluate import evaluate
from spd_lens.examples import Example
from spd_lens.runs.context_limit import fitted, in_words, left_out
from spd_lens.runs.experiment import Experiment
from spd_lens.runs.rounds import run_rounds
from spd_lens.study.config import StudyConfig
from spd_lens.study.engine import run_study
from spd_lens.subspaces.controls import shuffled_answers
from spd_lens.subspaces.extract import extract
from spd_lens.tasks.base import Pools, Task
from tests.conftest import N_CTX
from tests.helpers import killed_once_there, refused
from tests.runs.test_pipeline import assert_same_results

NEW = 8
"""Token limit of completions, in training and in evaluation."""
DROP = spd.SPDConfig.make({"too_long": "drop", "max_new_tokens": NEW, "engine": "twin"})


def record(pair, id, split, *, whole=None, prompt=None, completion="It is 98765"):
    """A record whose prompt, or whose prompt and completion, has so many tokens; the answer is at its end."""
    for size in range(1, N_CTX + 2):
        text = f"{id} {'x' * size}"
        found = Example(text, completion)
        if whole == len(pair.format.joint(found).ids) or prompt == len(pair.format.prompt_ids(text)):
            answer = completion.split()[-1]
            return {"id": id, "split": split, "prompt": text, "completion": completion, "answer": answer}
    raise AssertionError(id)


@pytest.fixture(scope="module")
def records(tiny_pair):
    """Short ones; of every split some as long as the model allows (`...full`) and some one token longer (`...over`)."""
    short = [
        {"id": f"{split}-{n}", "split": split, "prompt": f"{split} {n}?", "completion": f"It is {n}.", "answer": str(n)}
        for split, count in (("calibration", 5), ("train", 6), ("test", 5))
        for n in range(count)
    ]
    gold = "It is " + "x" * 60 + " 98765"
    return short + [
        record(tiny_pair, "calibration-full", "calibration", whole=N_CTX),
        record(tiny_pair, "calibration-over", "calibration", whole=N_CTX + 1),
        record(tiny_pair, "train-full", "train", prompt=N_CTX - NEW),
        record(tiny_pair, "train-over", "train", prompt=N_CTX - NEW + 1),
        record(tiny_pair, "test-full", "test", prompt=N_CTX - NEW, completion="7"),
        record(tiny_pair, "test-over", "test", prompt=N_CTX - NEW + 1, completion="7"),
        record(tiny_pair, "gold-full", "test", whole=N_CTX, completion=gold),
        record(tiny_pair, "gold-over", "test", whole=N_CTX + 1, completion=gold),
    ]


SIZES = {"n_calibration": 7, "n_train": 8, "n_eval": 9}
"""All there are."""
COUNTS = {
    "context": N_CTX,
    "calibration": {"left_out": 1, "of": 7},
    "train": {"left_out": 1, "of": 8},
    "test": {"left_out": 2, "of": 9},
}


@pytest.fixture
def data(records, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records))
    return path


@pytest.fixture
def task(data):
    return spd.tasks.get(str(data), max_new_tokens=NEW)


@pytest.fixture
def settings(tiny_settings, data):
    changes = {"n_compared": 4, "n_random": 1, "policies": ["base", "spd"], "epochs": 1, "too_long": "drop"}
    return {**tiny_settings, **SIZES, "task": str(data), **changes}


def config_of(settings, **changes):
    return spd.SPDConfig.make({**settings, **changes})


def ids(examples):
    return {example.id for example in examples}


# what fits


def test_a_text_as_long_as_the_context_stays_and_one_token_more_goes(task, tiny_pair):
    fitting = fitted(task, tiny_pair, DROP)
    assert ids(task.calibration(None)) - ids(fitting.calibration(None)) == {"calibration-over"}
    assert ids(task.train(None)) - ids(fitting.train(None)) == {"train-over"}
    assert ids(task.test(None)) - ids(fitting.test(None)) == {"test-over", "gold-over"}
    assert fitting.draw("test", None, 42) == task.test(None), "nothing is taken from the task itself"
    order = [e.id for e in task.test(None, 3)]
    assert [e.id for e in fitting.test(None, 3)] == [id for id in order if id in ids(fitting.test(None))]


def test_a_calibration_text_that_is_cut_stays_where_a_scored_token_is_left(task, tiny_pair):
    over = next(e for e in task.calibration(None) if e.id == "calibration-over")
    first = tiny_pair.format.encode(over).scored[0]
    for most, stays in ((first, False), (first + 1, True), (N_CTX, True), (10 * N_CTX, False)):
        config = DROP.model_copy(update={"max_calibration_tokens": most})
        fitting = fitted(task, tiny_pair, config)
        assert ("calibration-over" in ids(fitting.calibration(None))) == stays, most
        assert ids(fitting.train(None)) == ids(fitted(task, tiny_pair, DROP).train(None))
    most = min(max(tiny_pair.format.encode(e).scored) + 1 for e in task.calibration(None))
    kept = fitted(task, tiny_pair, config := DROP.model_copy(update={"max_calibration_tokens": most})).calibration(None)
    moments = extract(tiny_pair, kept, settings=config.extraction, progress=False)
    assert int(moments.n_tokens.sum()) == sum(min(most, len(tiny_pair.encode(e).ids)) for e in kept)
    counts = left_out(tiny_pair, config, {"calibration": {"own": (fitted(task, tiny_pair, config), 7)}})
    lost = 7 - len(kept)
    assert lost and counts == {
        "context": N_CTX, "max_calibration_tokens": most, "calibration": {"own": {"left_out": lost, "of": 7}},
    }  # fmt: skip
    assert in_words(counts) == (
        f"beyond the context of {N_CTX} tokens, or with no scored token among the first {most} of a calibration text: "
        f"{lost} of 7 calibration examples"
    )


def test_training_prompts_that_are_cut_fit_and_test_items_are_not_cut(task, tiny_pair):
    cut = fitted(task, tiny_pair, DROP.model_copy(update={"max_prompt_tokens": N_CTX - NEW}))
    assert ids(cut.train(None)) == ids(task.train(None))
    assert ids(task.test(None)) - ids(cut.test(None)) == {"test-over", "gold-over"}
    one_more = fitted(task, tiny_pair, DROP.model_copy(update={"max_prompt_tokens": N_CTX - NEW + 1}))
    assert ids(task.train(None)) - ids(one_more.train(None)) == {"train-over"}
    far = Example("Tom has 12 apples. " * 6000)  # not even tokenised to its end where it is not cut
    assert cut._fits("train", far) and not cut._fits("test", far) and not one_more._fits("train", far)


def test_a_span_that_truncation_would_cut_is_never_half_there(task, tiny_pair):
    """The examples that stay are measured whole: every token counted, every span found."""
    kept = fitted(task, tiny_pair, DROP).calibration(None)
    moments = extract(tiny_pair, kept, engine="twin", progress=False)
    whole = [tiny_pair.encode(example) for example in kept]
    assert max(len(e.ids) for e in whole) == N_CTX
    assert int(moments.n_tokens.sum()) == sum(len(e.ids) for e in whole)
    over = next(e for e in task.calibration(None) if e.id == "calibration-over")
    scored = tiny_pair.format.encode(over).scored
    assert scored[0] < N_CTX == scored[-1], "truncated, it would be scored on a part of its answer"


def test_nothing_is_left_out_unless_asked(task, tiny_pair):
    for_error = spd.SPDConfig.make({})
    assert fitted(task, tiny_pair, for_error) is task
    assert left_out(tiny_pair, for_error, {"train": {"own": (task, 8)}}) == {}


def test_evaluation_takes_what_fits_its_own_limit(task, tiny_pair):
    fitting = fitted(task, tiny_pair, DROP, NEW + 1)
    assert ids(task.test(None)) - ids(fitting.test(None)) == {"test-full", "test-over", "gold-over"}
    result = evaluate(tiny_pair, fitting, 9, max_new_tokens=NEW + 1, progress=False)
    assert {item.id for item in result.items} == ids(fitting.test(None))
    with refused("'test-full'", "--too-long drop"):
        evaluate(tiny_pair, fitted(task, tiny_pair, DROP), 9, max_new_tokens=NEW + 1, progress=False)


@dataclass(kw_only=True)
class Choice(Task):
    """One item whose other answer is longer than the one that is right."""

    name: ClassVar[str] = "choice"
    n_prompt: int

    def load(self):
        item = Example("x" * self.n_prompt, "Answer: A", [(8, 9)], "only")
        return Pools([], [item])

    def extract(self, text):
        return text

    def score(self, item, text):
        return 0.0

    def sources(self):
        return {}

    def choices(self, item):
        return ("A", "xxxxxxxxxxxxxxxx")


def test_every_answer_that_may_stand_in_an_item_must_fit(tiny_pair):
    of = {n: Choice(n_prompt=n, max_new_tokens=1) for n in range(200, 250)}
    longest = {
        n: len(tiny_pair.format.joint(Example("x" * n, "Answer: xxxxxxxxxxxxxxxx")).ids) for n in of
    }  # fmt: skip
    fits = max(n for n, length in longest.items() if length <= N_CTX)
    assert len(tiny_pair.encode(of[fits + 1].test(1)[0]).ids) < N_CTX
    assert fitted(of[fits], tiny_pair, DROP).test(1) == of[fits].test(1)
    with refused("none of 1 test examples", "choice"):
        fitted(of[fits + 1], tiny_pair, DROP).test(1)


def test_the_lens_model_has_a_context_of_its_own(task, pair_of, backend, monkeypatch):
    tiny_pair = pair_of("llama", backend)
    monkeypatch.setattr(tiny_pair.lens.cfg, "n_ctx", 100)
    lens = fitted(task, tiny_pair, DROP.model_copy(update={"engine": "lens"}))
    draws = {"calibration": {"own": (lens, 7)}, "test": {"own": (lens, 9)}}
    counts = left_out(tiny_pair, DROP.model_copy(update={"engine": "lens"}), draws)
    assert counts["calibration"]["own"]["left_out"] == 2 and counts["test"]["own"]["left_out"] == 2
    assert f"{N_CTX} tokens (100 in the lens model): 2 of 7 calibration" in in_words(counts)
    with refused("'calibration-full'", "lens model", "engine='twin'"):
        tiny_pair.encode(next(e for e in task.calibration(None) if e.id == "calibration-full"), "aligned", "lens")


def test_where_nothing_is_left(settings, tiny_pair, tmp_path):
    data = tmp_path / "long.jsonl"
    entries = [record(tiny_pair, f"long-{n}", "train", prompt=N_CTX - n) for n in range(3)]
    tests = [{"id": f"t{n}", "split": "test", "prompt": f"{n}?", "completion": "7", "answer": "7"} for n in range(2)]
    short = [{"id": "c", "split": "calibration", "prompt": "c?", "completion": "7", "answer": "7"}]
    data.write_text("".join(json.dumps(entry) + "\n" for entry in entries + tests + short))
    sizes = {"n_calibration": 1, "n_train": 3, "n_eval": 2, "n_compared": 1}
    with refused("none of 3 train examples", "context", "max_new_tokens"):
        spd.run(config_of(settings, task=str(data), **sizes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


# a whole run


@pytest.mark.parametrize(
    ("sizes", "named"), [({}, "calibration-over"), ({"n_calibration": 1, "data_seed": 1}, "train-over")], ids=str
)
def test_without_it_the_way_out_is_named(settings, tmp_path, sizes, named):
    with refused(f"'{named}'", "--too-long drop"):
        spd.run(config_of(settings, too_long="error", **sizes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def run(settings, tmp_path):
    return spd.run(config_of(settings), tmp_path / "run", progress=False)


def test_the_counts_are_in_the_record_and_in_the_summary(run, settings):
    expected = {key: value if key == "context" else {} for key, value in COUNTS.items()}
    for split in ("calibration", "train", "test"):
        expected[split] = {"own" if split == "test" else settings["task"]: COUNTS[split]}
    assert json.loads((run.path / "run.json").read_text())["left_out"] == expected
    assert (
        f"- Left out, beyond the context of {N_CTX} tokens: 1 of 7 calibration examples, 1 of 8 training prompts, "
        "2 of 9 test items of own.\n"
    ) in run.summary
    assert "- Calibration: 6 examples" in run.summary and "- Corpus: 7 completions" in run.summary
    assert "## `own`: 7 test items" in run.summary
    assert int(run.moments.n_examples.sum()) == 6
    assert {r.id for r in run.corpus} == {"train-full", *(f"train-{n}" for n in range(6))}
    tested = {"test-full", "gold-full", *(f"test-{n}" for n in range(5))}
    assert {item.id for item in run.result("own", "spd").items} == tested
    assert {item.id for item in run.effects("own")["spd"]} == tested


def test_analyses_see_what_the_run_saw(run, tiny_pair):
    subject = Subject(run.path, progress=False)
    assert ids(subject.calibration()) == {"calibration-full", *(f"calibration-{n}" for n in range(5))}
    assert "test-over" not in ids(subject.held_out(9)) and "gold-full" in ids(subject.held_out(9, "own"))
    everywhere = subject.moments_everywhere()
    for site in run.moments.sites:
        torch.testing.assert_close(everywhere.gradient[site], run.moments.gradient[site], rtol=1e-4, atol=1e-12)


def test_a_sweep_over_sizes_has_the_sizes_that_are_left(run, task, capsys):
    drawn = task.calibration(6, run.config.data_seed)
    assert "calibration-over" in ids(drawn)
    calibration_size.main([run.path], sizes="1,2,3", draws=1, faults=False, items=0, quiet=True)
    assert "5 calibration examples: sizes [1, 2] alone are possible" in " ".join(capsys.readouterr().out.split())
    assert sorted(Subject(run.path).saved("calibration_size").n_examples.unique()) == [1, 2]


def test_a_killed_run_ends_with_the_same(run, settings, processes, tmp_path):
    out = tmp_path / "killed"
    for stage in ("moments.safetensors", "corpus.jsonl", "eval/own/base.jsonl"):
        killed_once_there(processes, out, stage, spd.run, config_of(settings), out, progress=False)
    again = spd.run(config_of(settings), out, progress=False)
    assert_same_results(again, run)
    assert again.notes["left_out"] == run.notes["left_out"]


def test_another_choice_of_texts_is_refused(run, settings):
    """A tokenizer that was changed meanwhile, say."""
    run.note(left_out={**run.notes["left_out"], "context": 128})
    with refused("the choice of texts that fit", "left_out differs"):
        spd.run(config_of(settings), run.path, progress=False)


# rounds, studies, methods


def test_rounds_leave_out_the_same(settings, tiny_pair, tmp_path):
    config = config_of(settings, n_eval=4, engine="twin", policies=["spd"], n_random=0)
    done = run_rounds(config, tmp_path / "rounds", 1, n_held_out=5, progress=False, pair=tiny_pair)
    assert done.run(1).notes["left_out"]["calibration"][config.task] == COUNTS["calibration"]
    scored = {item.id for item in done.run(1).result("own", "spd").items}
    held_out = {item.id for item in done.effects(0)}
    every = fitted(spd.tasks.get(config.task, max_new_tokens=NEW), tiny_pair, config).test(9, config.data_seed)
    assert not scored & held_out and scored | held_out == ids(every)


def test_a_study_leaves_out_the_same_for_all_methods(settings, tiny_pair, tmp_path):
    own = ("task", "task_options", "policies", "n_random", "n_compared", "model", "eval_tasks", "seed")
    study = run_study(
        StudyConfig.make(
            {
                "methods": ["psr", "spd-shuffled"],
                "sources": [settings["task"]],
                "seeds": [1],
                "n_forced": 9,
                "n_side_effects": 0,
                "task_options": {settings["task"]: {"max_new_tokens": NEW}},
                "settings": {**{k: v for k, v in settings.items() if k not in own}, "n_eval": 8},
            }
        ),
        tmp_path / "study",
        pair=tiny_pair,
    )
    assert study.notes["left_out"] == {
        "context": N_CTX, **{split: {"own": COUNTS[split]} for split in ("calibration", "train", "test")},
    }  # fmt: skip
    report = (study.path / "report.md").read_text()
    assert f"- Left out: beyond the context of {N_CTX} tokens: 1 of 7 calibration examples" in report
    assert re.search(r"\| too_long \| not stated \| drop \|", report)
    for cell in study.cells():
        assert len(spd.Corpus.load(cell.corpus_path)) == 7
        assert len(cell.effects("own")["trained"]) == 7


def test_shuffled_answers_may_make_an_example_too_long(tiny_pair, tmp_path):
    """The example fits with its own answer, and is left out where it gets a longer one."""
    full = record(tiny_pair, "full", "calibration", whole=N_CTX)
    entries = [full] + [
        {"id": f"e{n}", "split": "calibration", "prompt": f"{n}?", "completion": f"It is {'y' * n}.", "answer": "y" * n}
        for n in range(10, 20)
    ]
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    config = DROP.model_copy(update={"task": str(data), "n_calibration": 11})
    tasks = (spd.tasks.get(str(data)), {})
    for _ in range(2):  # extracted, and read
        experiment = Experiment(config, tmp_path, pair=tiny_pair, tasks=tasks, shared=True)
        assert len(experiment.calibration) == 11
        assert "full" in ids(shuffled_answers(experiment.calibration, config.seed))
        assert int(experiment.moments(shuffled=True).n_examples.sum()) == 10
        assert int(experiment.moments().n_examples.sum()) == 11


# the stage commands


def test_stage_commands(settings, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "spd_lens.cli.commands.set_up_logging", lambda *_, **__: None
    )  # it would take the messages from the test
    model = ["--model", settings["model"], "--dtype", "float32", "--device", "cpu"]
    common = [*model, "--task", "own.jsonl", "--task-option", f"max_new_tokens={NEW}", "--too-long", "drop", "--quiet"]
    for command, sizes, said in [
        ("extract", ["--n-calibration", 7, "--engine", "twin", "--out", "x"], "1 of 7 calibration examples"),
        ("generate", ["--n-train", 8, "--max-new-tokens", NEW, "--out", "c.jsonl"], "1 of 8 training prompts"),
        ("evaluate", ["--n-eval", 9, "--out", "e.json"], "2 of 9 test items of own.jsonl"),
    ]:
        caplog.clear()
        done = CliRunner().invoke(app, [command, *common, *map(str, sizes)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert f"left out, beyond the context of {N_CTX} tokens: {said}" in caplog.text
    assert int(spd.GradientMoments.load("x/moments.safetensors").n_examples.sum()) == 6
    assert len(spd.Corpus.load("c.jsonl")) == 7
    assert len(spd.EvalResult.load("e.json").items) == 7
