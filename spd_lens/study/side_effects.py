"""Side effects: texts that a method was never aimed at.

The measure on them is teacher-forced: the loss per token, and KL from the base model. A method that sharpens one
capability by forgetting others shows a higher loss here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from spd_lens import tasks
from spd_lens.evaluation import NEUTRAL, fitting, other_texts
from spd_lens.examples import Example
from spd_lens.models import ModelPair
from spd_lens.tasks import Task

if TYPE_CHECKING:
    from spd_lens.study.config import StudyConfig

SYNTHETIC = ("synthetic-math", "synthetic-code", "synthetic-qa")
"""Tasks that need no files, so that every study has other tasks to look at."""
PUBLISHED = ("gsm8k", "svamp", "mbpp", "codealpaca", "mmlu", "bbh")
"""Tasks that are looked at where `data_dir` holds them; nothing is fetched for side effects."""


def side_effect_examples(config: StudyConfig, pair: ModelPair | None = None) -> dict[str, list[Example]]:
    """Texts that the study neither trains nor evaluates on, by set: gold completions of other tasks, and prose.

    Every example's one span is its whole completion, so that the aligned loss of `teacher_forced` is the NLL per token.

    Args:
        config: `sources` and `targets` are left out; `n_side_effects` texts of each set (fewer where it has fewer; 0
            gives no set at all), drawn with `data_seed`; other benchmarks are read from `data_dir` where it has them.
        pair: Leave out texts that do not fit this model's context, and sets of which none does.
    """
    settings, n = config.shared, config.n_side_effects
    if not n:
        return {}
    places: dict[str, str | None] = dict.fromkeys(SYNTHETIC)
    if (data_dir := settings.data_dir) is not None:
        places |= {name: data_dir for name in PUBLISHED if (Path(data_dir).expanduser() / name).is_dir()}
    sets = {
        name: held_out_texts(tasks.get(name, place), n, settings.data_seed)
        for name, place in places.items()
        if name not in {*config.sources, *config.targets}
    }
    sets[NEUTRAL] = other_texts(n)
    if pair is not None:
        sets = {name: fitting(pair, items) for name, items in sets.items()}
    return {name: items for name, items in sets.items() if items}


def held_out_texts(task: Task, n: int, seed: int = 42) -> list[Example]:
    """Up to `n` test items of a task, each with its whole gold completion as the span."""
    available = n if task.name in SYNTHETIC else len(task.pool("test"))
    items = task.test(min(n, available), seed)
    return [replace(item, spans=((0, len(item.completion)),), marks={}) for item in items if item.completion]
