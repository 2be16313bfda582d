"""What a run and a study have in common: steps that are done in order and once, and notes on what they began with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from spd_lens.evaluation import known_as, own_names
from spd_lens.generation import NOT_APPLIED, Decoding
from spd_lens.models import ModelPair, weights_digest
from spd_lens.runs.artefacts import Artefacts
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.context_limit import Draws, left_out
from spd_lens.runs.experiment import Experiment
from spd_lens.runs.run_dir import Folder
from spd_lens.subspaces import Policy

log = logging.getLogger(__name__)


class Step(NamedTuple):
    """One piece of work of a stage."""

    stage: str
    what: Any
    """How the log names it."""
    is_done: Callable[[], bool]
    """Whether its artefacts exist and are undamaged."""
    do: Callable[[], object]
    """Makes its artefacts. It returns False if those of another cell were copied."""
    is_begun: Callable[[], bool] = lambda: False
    """Whether an earlier process, which was killed, has done a part of it."""


def work(
    steps: Sequence[Step], pair: ModelPair, keeps_lens: bool, do: Callable[[Step, str, Sequence[Step]], None]
) -> None:
    """Do what is not done yet, in order; `do` is given a step, its place (`[1/7]`), and those that are left after it.

    Only extraction looks at the lens model, which is then dropped, unless the caller's pair came with it.
    """
    todo = [step for step in steps if not step.is_done()]
    log.info("%d of %d units to do", len(todo), len(steps))
    for place, step in enumerate(todo, start=1):
        if step.stage != "extract" and not keeps_lens:
            pair.drop_lens()
        do(step, f"[{place}/{len(todo)}]", todo[place:])
    if not keeps_lens:
        pair.drop_lens()


def score(experiment: Experiment, there: Artefacts, target: str, name: str, policy: Policy) -> None:
    """Score a policy on a target's items; what was measured teacher-forced on them is not measured again."""
    path = there.result_path(target, name)
    forced = there.effects(target)[name] if there.effects_path(target).exists() else []
    experiment.score(target, policy, path, completions=path.with_suffix(".jsonl"), forced=forced)


def note_start(
    folder: Folder,
    experiments: Mapping[str, Experiment],
    n_test: Callable[[str], int],
    data: Mapping[str, Mapping[str, Any]],
) -> None:
    """Note model, data, set-up and machine; refused where an earlier start saw something else.

    Args:
        folder: The folder of a run or a study.
        experiments: By the name of the source; they share one model, one set of targets and the settings noted here.
        n_test: Number of test items that are drawn of a target.
        data: What is noted of the data, by what a refusal calls it.
    """
    first = next(iter(experiments.values()))
    folder.note_once("the model", fingerprint=first.pair.fingerprint.to_dict(), weights=weights_digest(first.pair.hf))
    for what, fields in data.items():
        folder.note_once(what, **fields)
    note_set_up(folder, first.config, first.pair)
    draws: Draws = {
        "calibration": {name: (own.calibrated, own.config.n_calibration) for name, own in experiments.items()},
        "train": {name: (own.task, own.config.n_train) for name, own in experiments.items()},
        "test": {name: (task, n_test(name)) for name, task in first.targets.items()},
    }
    if counts := left_out(first.pair, first.config, draws):
        folder.note_once("the choice of texts that fit", left_out=counts)
    folder.note_environment()


def note_set_up(folder: Folder, config: SPDConfig, pair: ModelPair) -> None:
    """Note what the settings were resolved to; refused where an earlier start resolved them otherwise."""
    decoding = Decoding.of(pair, config.sampling)
    own = dict(decoding.own.settings)
    if NOT_APPLIED in own:
        folder.note(**{NOT_APPLIED: own.pop(NOT_APPLIED)})
    resolved = {
        "dtype": str(pair.dtype).removeprefix("torch."),
        "device": str(pair.device),
        "backend": pair.backend,
        "sampling": decoding.sampling.to_dict(),
        "format": pair.format.name,
        **own,
    }
    folder.note_once("the set-up", resolved=resolved)
    # what the model's files say is at hand now, and perhaps no more when the report is read
    if known_as(config.model) is None and (name := known_as(*own_names(config.model, pair.hf.config))):
        folder.note(published_name=name)
    folder.note_date(pair)
