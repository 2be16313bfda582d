"""Names, options, presets, and what `tasks` must not import."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

import spd_lens.tasks as tasks
from spd_lens.errors import SPDError


def test_unknown_names_list_what_there_is(tmp_path):
    with pytest.raises(SPDError, match="no task 'gsm9k' .did you mean 'gsm8k'.*svamp"):
        tasks.get("gsm9k")
    with pytest.raises(SPDError, match="gsm8k has no option 'spam' .did you mean 'span'.*max_new_tokens"):
        tasks.get("gsm8k", spam="line")
    with pytest.raises(SPDError, match="no span 'word'; choose one of number, line, completion"):
        tasks.get("gsm8k", span="word")
    with pytest.raises(SPDError, match="not a directory; gsm8k needs one with train.jsonl and test.jsonl"):
        tasks.get("gsm8k", path=tmp_path / "nowhere")
    with pytest.raises(SPDError, match="whole number of at least 1"):
        tasks.get("gsm8k", path=tmp_path, max_new_tokens=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": 1}, "mbpp takes no option 'executor' from settings; the setting allow_code_execution says it"),
        ({"executor": print}, "the setting allow_code_execution"),
        ({"executor": None}, "the setting allow_code_execution"),
        ({"path": "x"}, "mbpp takes no option 'path' from settings; the setting data_dir says it"),
        ({"name": "gsm8k"}, "mbpp has no option 'name'"),
        ({"source": 1}, "mbpp has no option 'source'"),
        ({"exekutor": 1}, r"mbpp has no option 'exekutor'; it has (?!.*(executor|path))"),
        ({1: 2}, "mbpp has no option 1;"),
    ],
)
def test_settings_offer_neither_code_nor_paths(options, message):
    with pytest.raises(SPDError, match=message):
        tasks.configured("mbpp", None, options)


def test_settings_make_the_task_that_they_describe(tmp_path):
    made = tasks.configured("mbpp", tmp_path, {"span": "asserts"})
    assert (made.span, made.path) == ("asserts", tmp_path)
    with pytest.raises(SPDError, match="executor must be a function .* not 1"):
        tasks.get("mbpp", executor=1)


def test_every_task_has_what_the_contract_says():
    for name in tasks.names():
        task = tasks.get(name, path="somewhere.jsonl" if name == "jsonl" else None)
        assert type(task).name == name and type(task).__doc__
        assert task.max_new_tokens >= 16


def test_a_registered_task_is_known():
    from spd_lens.tasks.synthetic_math import SyntheticMath

    @tasks.register
    @dataclass(kw_only=True)
    class Mine(SyntheticMath):
        name = "mine"

    try:
        assert tasks.get("mine").train(1)[0].id.startswith("mine-train-")
    finally:
        from spd_lens.tasks import registry

        del registry._TASKS["mine"]


def test_paper_preset():
    paper = tasks.PRESETS["paper"]
    assert set(paper) <= {*tasks.names()}
    assert paper["gsm8k"] == {"n_calibration": 50, "n_train": 7473, "n_test": 100}
    assert [paper[t]["n_test"] for t in ("svamp", "mbpp", "codealpaca", "mmlu", "bbh")] == [100, 257, 100, 200, 300]
    assert [paper[t]["n_train"] for t in ("mbpp", "mmlu")] == [464, 2000]


def test_tasks_import_no_model_library():
    unwanted = ["torch", "transformers", "transformer_lens", "datasets", "math_verify"]
    code = f"import sys, spd_lens.tasks; print([m for m in {unwanted} if m in sys.modules])"
    env = {"PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
