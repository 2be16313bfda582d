"""Tasks: published benchmarks, synthetic domains and anyone's own data, as prompts, gold completions and scores.

`get(name)` makes a task, `configured` one from settings; `names()` lists them; `PRESETS["paper"]` has the paper's
sizes. Nothing in here knows of models.
"""

from spd_lens.tasks.base import Pools, PublishedTask, Scoring, Split, Task
from spd_lens.tasks.bbh import REFERENCE_SUBTASKS
from spd_lens.tasks.code import CodeTask
from spd_lens.tasks.forms import ChosenLetter, FinalNumber
from spd_lens.tasks.marks import copies, stands_in, value_of
from spd_lens.tasks.registry import PRESETS, configured, get, names, register
from spd_lens.tasks.scoring.reading import answer_part, runs_on
from spd_lens.tasks.thoughts import without_thoughts

__all__ = [
    "ChosenLetter", "CodeTask", "FinalNumber", "PRESETS", "Pools", "PublishedTask", "REFERENCE_SUBTASKS", "Scoring",
    "Split", "Task", "answer_part", "configured", "copies", "get", "names", "register", "runs_on", "stands_in",
    "value_of", "without_thoughts",
]  # fmt: skip
