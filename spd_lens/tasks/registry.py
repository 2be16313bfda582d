"""Tasks by name, and the paper's sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from spd_lens.errors import SPDError
from spd_lens.registry import Registry, did_you_mean
from spd_lens.tasks.base import Task
from spd_lens.tasks.bbh import BBH
from spd_lens.tasks.codealpaca import CodeAlpaca
from spd_lens.tasks.gsm8k import GSM8K
from spd_lens.tasks.mbpp import MBPP
from spd_lens.tasks.mmlu import MMLU
from spd_lens.tasks.own import OwnData
from spd_lens.tasks.svamp import SVAMP
from spd_lens.tasks.synthetic_code import SyntheticCode
from spd_lens.tasks.synthetic_math import SyntheticMath
from spd_lens.tasks.synthetic_qa import SyntheticQA

TaskClass = TypeVar("TaskClass", bound=type[Task])

_TASKS: Registry[type[Task]] = Registry("task", "there is no task {name}{guess}; there are {names}")

_SETTINGS = {"path": "data_dir", "executor": "allow_code_execution"}
"""Fields of tasks that are no options where a task is made from settings, and the settings in their place."""

PRESETS: dict[str, dict[str, dict[str, int]]] = {
    "paper": {
        "gsm8k": {"n_calibration": 50, "n_train": 7473, "n_test": 100},
        "svamp": {"n_calibration": 0, "n_train": 0, "n_test": 100},
        "mbpp": {"n_calibration": 50, "n_train": 464, "n_test": 257},
        "codealpaca": {"n_calibration": 0, "n_train": 0, "n_test": 100},
        "mmlu": {"n_calibration": 50, "n_train": 2000, "n_test": 200},
        "bbh": {"n_calibration": 0, "n_train": 0, "n_test": 300},
    }
}
"""Sizes by preset and task. `paper`: tables 7 and 8; 0 where the paper only evaluates on a benchmark."""


def register(task: TaskClass) -> TaskClass:
    """Class decorator that makes a task known under its `name`, in the library or in a notebook.

    Raises `SPDError` for a name that another task has.
    """
    _TASKS.add(task)
    return task


for _task in (GSM8K, SVAMP, MBPP, CodeAlpaca, MMLU, BBH, SyntheticMath, SyntheticCode, SyntheticQA, OwnData):
    register(_task)


def names() -> list[str]:
    """The names that `get` knows, beside those of `.jsonl` files."""
    return sorted(_TASKS)


def get(name: str, path: str | Path | None = None, **options: Any) -> Task:
    """The task called `name`.

    `path` is a local directory with the original files (or one that holds it under the task's name); without it the
    task is read from the hub. Synthetic tasks are made here and read neither. `options` are the task's own fields,
    described in docs/tasks.md. A name that ends in `.jsonl` is a file of your own.
    """
    if name.endswith(".jsonl"):
        name, path = OwnData.name, name
    make: Callable[..., Task] = _known(name, options, hidden=("path",))
    return make(path=path, **options)


def configured(name: str, data_dir: str | Path | None, options: Mapping[str, Any], prompt_format: str = "auto") -> Task:
    """The task that settings describe; options that only Python can give are refused.

    With `prompt_format="verbatim"`, own data is taken as it is written: its option `prompt_template` is `"{prompt}"`
    where the settings do not say another.
    """
    for option, setting in _SETTINGS.items():
        if option in options:
            raise SPDError(f"{name} takes no option {option!r} from settings; the setting {setting} says it")
    task = _known(OwnData.name if name.endswith(".jsonl") else name, options, hidden=tuple(_SETTINGS))
    if prompt_format == "verbatim" and issubclass(task, OwnData):
        options = {"prompt_template": "{prompt}", **options}
    return get(name, data_dir, **options)


def _known(name: str, options: Mapping[str, Any], hidden: Collection[str]) -> type[Task]:
    """The task's class; refuses a name that there is not, and options that the task does not have."""
    task = _TASKS.find(name, names())
    known = [item.name for item in fields(task) if item.init and item.name not in hidden]
    for option in options:
        if option not in known:
            guess = did_you_mean(str(option), known)
            raise SPDError(f"{name} has no option {option!r}{guess}; it has {', '.join(known)}")
    return task
