"""What settings name, as objects: the model pair and the tasks."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from spd_lens.models import ModelPair, load
from spd_lens.protocols import protocol
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.run_dir import Folder
from spd_lens.sandbox import passes_tests
from spd_lens.tasks import CodeTask, Task

log = logging.getLogger(__name__)

Tasks = tuple[Task, dict[str, Task]]
"""The source task, and the tasks to evaluate on by the names that their results are kept under."""

OF_THE_PAIR = (
    "model", "backend", "dtype", "device", "device_map", "offload_folder", "prompt_format",
    "add_special_tokens", "span_rule", "system", "enable_thinking", "prompt_date",
)  # fmt: skip
"""The settings that decide which pair is loaded."""


def load_pair(config: SPDConfig) -> ModelPair:
    """The pair that a config names."""
    log.info("loading %s", config.model)
    return load(config.model, **{name: getattr(config, name) for name in OF_THE_PAIR[1:]})


def ready_pair(pair: ModelPair | None, config: SPDConfig, folder: Folder) -> ModelPair:
    """The pair that is given, or the one that the settings name, as on the day on which the folder was begun."""
    if pair is None:
        pair = load_pair(config)
    elif pair.has_lens:
        pair.check()  # an edited lens model would be measured, and the twin trained
    return folder.dated(pair)


def decided_by(pair: ModelPair, prompt_format: str) -> dict[str, Any]:
    """The settings that a pair which is loaded already has decided, whatever a config says; `prompt_format` is what it
    says of that."""
    form = pair.format
    day = form.prompt_date if form.date_given else None
    decided = {"model": pair.name, "system": form.system, "enable_thinking": form.enable_thinking, "prompt_date": day}
    if "verbatim" in (form.name, prompt_format):  # which no tokenizer stands for, as it does for the other two
        decided["prompt_format"] = form.name
    return {**decided, "add_special_tokens": form.add_special_tokens, "span_rule": form.span_rule}


def make_tasks(config: SPDConfig, *, trains: bool = True) -> Tasks:
    """The tasks that a config names, as its protocol has them; a task that is source and target is made once.

    Args:
        config: The settings.
        trains: Whether calibration examples or training prompts will be drawn: a protocol may ask for others than those
            that the data hold beside the test items.
    """
    chosen, form = protocol(config.protocol), config.prompt_format
    source = chosen.task_for(config.task, config.data_dir, config.task_options, form, source=trains)
    targets = {
        key: source if name == config.task else chosen.task_for(name, config.data_dir, {}, form, source=False)
        for key, name in config.targets.items()
    }
    allow_execution(config, [source, *targets.values()])
    return source, targets


def allow_execution(config: SPDConfig, tasks: Iterable[Task]) -> None:
    """Let tasks that score programs run them, where the settings say so."""
    for task in tasks if config.allow_code_execution else ():
        if isinstance(task, CodeTask):
            task.executor = passes_tests
