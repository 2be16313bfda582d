"""docs/extending.md: each recipe is followed, with the code of the page as it stands."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

from spd_lens import estimators, methods, tasks
from spd_lens.analysis.index import ANALYSES
from spd_lens.cli.commands import app
from spd_lens.estimators import registry as estimator_registry
from spd_lens.methods import registry as method_registry
from spd_lens.models.architectures import ARCHITECTURES
from spd_lens.models.pair import ModelPair
from spd_lens.output.console import start
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.run_dir import Run
from spd_lens.tasks import registry as task_registry
from tests.conftest import build_tokenizer, randomise
from tests.helpers import refused

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
RECIPES = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}


def code(recipe: str) -> list[str]:
    """The Python blocks of a recipe."""
    return re.findall(r"^```python\n(.*?)^```", RECIPES[recipe], re.MULTILINE | re.DOTALL)


def follow(recipe: str, module: str = "mine", **given: Any) -> dict[str, Any]:
    """Execute the blocks of a recipe one after the other, as one module; returns its names."""
    names = {"__name__": module, **given}
    for block in code(recipe):
        exec(compile(block, f"docs/extending.md: {recipe}", "exec", dont_inherit=True), names)
    return names


def command(*arguments: object) -> int:
    """The exit code of `spd-lens`."""
    with pytest.raises(SystemExit) as stop:
        start(app, [str(argument) for argument in arguments], on_interrupt="")
    return int(stop.value.code or 0)


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a recipe registers is gone after it, and what it writes is in a folder of its own."""
    methods.names()
    estimators.names()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with ExitStack() as stack:
        for table in (
            task_registry._TASKS, method_registry._METHODS, estimator_registry._ESTIMATORS, ANALYSES, ARCHITECTURES,
        ):  # fmt: skip
            stack.enter_context(patch.dict(table))
        yield


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_at_most_ten_lines(recipe: str) -> None:
    steps = RECIPES[recipe].partition("\n1. ")[2].partition("\n\n")[0].splitlines()
    assert 0 < len(steps) <= 10
    assert all(len(line) <= 140 for line in steps)


def test_a_task() -> None:
    names = follow("A task")
    assert names["scores"] == (1.0, 0.0)
    task = names["task"]
    assert [len(task.pool(split)) for split in ("calibration", "train", "test")] == [50, 50, 50]
    assert {task.score(item, item.completion) for item in task.test(n=None)} == {1.0}
    follow("A task")  # a cell of a notebook is run again
    with refused("already a task", "'doubling'", "another name"):
        follow("A task", module="of_another")


def test_a_method(tiny_settings: dict[str, Any]) -> None:
    config = SPDConfig.make({**tiny_settings, "n_train": 4, "epochs": 1})
    names = follow("A method", config=config)
    corpus, subspace = names["corpus"], names["policy"].subspace
    assert len(corpus) == 4 and corpus.settings["strength"] == 0.5 and corpus.settings["temperature"] == 0.7
    assert corpus.settings["subspace"] == subspace.digest()
    assert {rank for ranks in subspace.ranks.values() for rank in ranks} == {2}  # a quarter of 8 dimensions
    assert (names["adapter"] / "adapter_model.safetensors").is_file()
    assert "spd-gentle" in methods.names()
    with refused("already a method", "'spd-gentle'", "another name"):
        follow("A method", module="of_another", config=config)


def test_an_estimator(tiny_pair: ModelPair) -> None:
    examples = tasks.get("synthetic-math").calibration(4, 1)
    names = follow("An estimator", pair=tiny_pair, examples=examples)
    moments, found = names["source"].gradients(keep=("classes",)), names["subspace"]
    wanted = moments.region("completion", "scored").subspace(0.5)
    assert found.digest() == wanted.digest() and found.origin["estimator"] == "completion-and-scored"
    follow("An estimator", pair=tiny_pair, examples=examples)
    with refused("already an estimator", "'completion-and-scored'", "another name"):
        follow("An estimator", module="of_another", pair=tiny_pair, examples=examples)


def test_an_analysis(finished_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, registration = code("An analysis")
    (tmp_path / "span_lengths.py").write_text(module, encoding="utf-8")
    exec(registration, names := {})
    shutil.copytree(finished_run.path, tmp_path / "run")
    assert command("analyze", "span-lengths", "run", "--n", "5", "--quiet") == 0
    shown = capsys.readouterr().out
    assert "median length" in shown and "Short spans name the answer" in shown
    assert len(pd.read_csv(tmp_path / "run" / "analysis" / "span-lengths.csv")) == 5
    assert command("analyze") == 0
    assert "span-lengths" in capsys.readouterr().out
    exec(registration, names)
    with refused("already an analysis", "'span-lengths'", "another name"):
        names["register"]("span-lengths", "of_another", "a question")
    with refused("already an analysis", "'rank-sweep'", "another name"):
        names["register"]("rank-sweep", "of_another", "a question")


def test_an_architecture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "gpt_bigcode" not in ARCHITECTURES
    tokenizer = build_tokenizer(chat=False)
    model = GPTBigCodeForCausalLM(
        GPTBigCodeConfig(
            vocab_size=len(tokenizer), n_embd=32, n_layer=4, n_head=4, n_positions=256, n_inner=64,
            bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )
    )  # fmt: skip
    randomise(model).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert command("check", tmp_path / "model", "--dtype", "float32") == 2
    assert "is not built like Llama" in " ".join(capfd.readouterr().err.split())
    follow("An architecture")
    assert command("check", tmp_path / "model", "--dtype", "float32") == 0
    assert "1 KV heads of 8" in capfd.readouterr().out
