"""Texts beyond a model's context: with `too_long="drop"` a task's draws leave them out, whole, and they are counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from spd_lens.errors import TooLong
from spd_lens.examples import Example
from spd_lens.models import ModelPair
from spd_lens.runs.config import SPDConfig
from spd_lens.subspaces import with_answers
from spd_lens.tasks import Split, Task

log = logging.getLogger(__name__)

Draws = Mapping[Split, Mapping[str, tuple[Task, int]]]
"""For each split and each name of a task: the task, and the number of examples that are drawn from it."""

_WORDS: dict[str, str] = {
    "calibration": "calibration examples", "train": "training prompts", "test": "test items",
}  # fmt: skip


def fitted(task: Task, pair: ModelPair, config: SPDConfig, max_new_tokens: int | None = None) -> Task:
    """The task as it is; or, with `too_long="drop"`, one that draws the same examples without those that do not fit.

    No text is cut for this but a calibration text at `config.max_calibration_tokens` and a training prompt at
    `config.max_prompt_tokens`: what a cut takes first is the end, where correctness spans are.

    Args:
        task: The task.
        pair: The model. A calibration example fits with its completion, in the context of the engine that captures; a
            training prompt, cut where the config says so, with `config.max_new_tokens` more; a test item with the
            answer's token limit, and with everything that is measured teacher-forced on it. A calibration example that
            is cut fits if a scored token is left.
        config: `too_long`, `engine`, `loss`, `max_calibration_tokens`, `max_new_tokens` and `max_prompt_tokens` count.
        max_new_tokens: The limit of an answer in evaluation; None: the task's own.
    """
    if config.too_long == "error":
        return task
    limit = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    room: dict[Split, int] = {"train": config.max_new_tokens, "test": limit}  # tokens that may follow a prompt
    most = config.max_calibration_tokens

    def length(example: Example) -> int:
        return len(pair.format.joint(example).ids)

    @cache  # every text is tokenised once
    def fits(split: Split, example: Example) -> bool:
        try:
            if split == "calibration":
                n = length(example) if most is None else len(pair.format.encode(example, config.loss, most).ids)
                return n <= pair.context(config.engine)
            prompt = pair.format.prompt_ids(example.prompt, config.max_prompt_tokens if split == "train" else None)
            if len(prompt) + room[split] > pair.n_ctx:
                return False
            return split == "train" or all(length(text) <= pair.n_ctx for text in forced_texts(task, example))
        except TooLong:
            return False

    return task.that_fits(fits)


def forced_texts(task: Task, item: Example) -> Iterator[Example]:
    """What is measured teacher-forced on a test item: its gold completion, and each answer that may stand in it."""
    if item.measurable:
        yield item
        yield from (with_answers(item, [choice]) for choice in task.choices(item))


def left_out(pair: ModelPair, config: SPDConfig, draws: Draws) -> dict[str, Any]:
    """Count the examples that do not fit, write the counts to the log, and return them.

    Returns:
        `{"context": 2048, "train": {"gsm8k": {"left_out": 3, "of": 500}}, ...}`; nothing unless `too_long` is `"drop"`.
    """
    if config.too_long == "error":
        return {}
    counts: dict[str, Any] = {"context": pair.n_ctx}
    if "calibration" in draws and (own := pair.context(config.engine)) != pair.n_ctx:
        counts["context_of_lens"] = own
    if "calibration" in draws and config.max_calibration_tokens is not None:
        counts["max_calibration_tokens"] = config.max_calibration_tokens
    for split, tasks in draws.items():
        counts[split] = {}
        for name, (task, n) in tasks.items():
            # what a task leaves out for reasons of its own is not beyond the context
            drawn = task.that_fits(lambda *_: True).kept(split, task.draw(split, n, config.data_seed))
            counts[split][name] = {"left_out": len(drawn) - len(task.kept(split, drawn)), "of": len(drawn)}
    lost = any(entry["left_out"] for split in draws for entry in counts[split].values())
    log.log(logging.WARNING if lost else logging.INFO, "left out, %s", in_words(counts))
    return counts


def in_words(counts: Mapping[str, Any]) -> str:
    """What `left_out` counted: "beyond the context of 2048 tokens: 2 of 50 calibration examples, ..."."""
    lens = f" ({counts['context_of_lens']} in the lens model)" if "context_of_lens" in counts else ""
    most = counts.get("max_calibration_tokens")
    cut = "" if most is None else f", or with no scored token among the first {most} of a calibration text"
    parts = []
    for split, words in _WORDS.items():
        tasks = counts.get(split, {})
        for name, n in tasks.items():
            # a run has one source, which its summary names; it may have several tasks to test on
            whose = f" of {name}" if split == "test" or len(tasks) > 1 else ""
            parts.append(f"{n['left_out']} of {n['of']} {words}{whose}")
    return f"beyond the context of {counts['context']} tokens{lens}{cut}: {', '.join(parts)}"
