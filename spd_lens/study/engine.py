"""`run_study`: every unit of the plan in its order, each made once, however often the study is stopped."""

from __future__ import annotations

import contextlib
import importlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from spd_lens import methods
from spd_lens.models import ModelPair, neutral
from spd_lens.runs import (
    Experiment,
    Step,
    allow_execution,
    check_data,
    check_model,
    decided_by,
    note_start,
    ready_pair,
    work,
)
from spd_lens.study.config import StudyConfig, named
from spd_lens.study.costs import Machine
from spd_lens.study.findings import write_evidence
from spd_lens.study.folder import Study
from spd_lens.study.plan import duration, remaining, unit_costs
from spd_lens.study.reporting.report import write_report
from spd_lens.study.results import write_tables
from spd_lens.study.shapes import shape_of
from spd_lens.study.side_effects import side_effect_examples
from spd_lens.study.stages import Bench, finish, step_of

log = logging.getLogger(__name__)


@neutral()
def run_study(config: StudyConfig, out: str | Path, *, progress: bool = False, pair: ModelPair | None = None) -> Study:
    """Methods x sources x targets x seeds on one model, into a folder; then the tables and the report.

    Every artefact is written whole or not at all and made once: a study that was killed and is started again continues
    and ends with the same files. Methods and seeds may be added to a study that exists; what is there stays untouched.

    Args:
        config: The study.
        out: Its folder; new, empty, or of the same study with fewer methods or seeds.
        progress: Show a progress bar for every unit, beside the log line that each one writes.
        pair: A pair that is already loaded, instead of the model that the settings name.

    Raises:
        SPDError: a method, task, setting or size that cannot work (found before anything is written where possible), a
            folder of another study, or a model or data set that is not the one the study was begun with.
    """
    if pair is not None:
        decided = decided_by(pair, config.settings["prompt_format"])
        config = StudyConfig.make({**config.model_dump(), "settings": {**config.settings, **decided}})
    keeps_lens = pair is not None and pair.has_lens
    with begun(config, out, progress=progress, pair=pair) as bench:
        _work(bench, keeps_lens)
        conclude(bench.study)
    return bench.study


@contextlib.contextmanager
def begun(
    config: StudyConfig, out: str | Path, *, progress: bool = False, pair: ModelPair | None = None
) -> Iterator[Bench]:
    """A study that can be worked on: model and data are checked and noted, and its folder is locked meanwhile.

    To be opened inside of `neutral`; arguments and errors are those of `run_study`.
    """
    study = Study(out)
    config = study.admits(config)
    experiments = checked_experiments(config, study.path, progress)
    pair = ready_pair(pair, config.shared, study)
    for experiment in experiments.values():
        experiment.pair = pair
    _check_model(config, experiments)
    with study.working(), study.guarded(config.shared.strict):
        config = study.admits(config)  # another process may have begun a study meanwhile
        texts = side_effect_examples(config, pair)
        if study.is_free:
            study.begin(config)  # the first file: whatever is killed from now on, this is a study
        bench = Bench(study, config, experiments, texts)
        _note(bench)
        study.begin(config)  # or it has grown
        yield bench


def conclude(study: Study) -> None:
    """Tables, findings and report of what is there, which may be less than the whole study."""
    write_tables(study.path)
    write_evidence(study)
    _report(study)


def checked_experiments(config: StudyConfig, path: Path, progress: bool = False) -> dict[str, Experiment]:
    """`experiments_of`, once all is refused that can be without a model."""
    experiments = experiments_of(config, path, progress)
    _check(config, experiments)
    side_effect_examples(config)
    return experiments


def experiments_of(config: StudyConfig, path: Path, progress: bool = False) -> dict[str, Experiment]:
    """The experiment of each source, with the first seed, by the name that its results are kept under.

    A task that is source and target, or source of one experiment and target of another, is made once.
    """
    shared = config.shared
    made = {name: config.task(name) for name in dict.fromkeys([*config.sources, *config.targets])}
    allow_execution(shared, made.values())
    targets = {key: made[name] for key, name in shared.targets.items()}
    # one extraction serves all methods
    keep = sorted({part for name in config.methods for part in methods.get(name).needs.get("keep", ())})
    return {
        key: Experiment(
            config.cell(name, config.seeds[0]),
            path / key,
            tasks=(made[name], targets),
            progress=progress,
            shared=True,
            keep=keep,
        )  # fmt: skip
        for key, name in named(config.sources).items()
    }


def _check(config: StudyConfig, experiments: Mapping[str, Experiment]) -> None:
    """What can be refused without a model: sizes that the data do not have, tasks that cannot be scored here."""
    for experiment in experiments.values():
        for method in config.methods:
            methods.get(method).check(experiment.config)
        check_data(experiment)
    for name, task in experiment.made[1].items():  # the targets are the same for all sources
        task.test(config.n_measured(name), config.shared.data_seed)


def _check_model(config: StudyConfig, experiments: Mapping[str, Experiment]) -> None:
    """What can be refused without work: layers and ranks that the model does not have, texts beyond its context."""
    for place, experiment in enumerate(experiments.values()):
        check_model(experiment, targets=place == 0)
    for name in experiment.targets:
        for item in experiment.items(name, config.n_measured(name)):
            experiment.pair.encode(item)


def _note(bench: Bench) -> None:
    """Model, data, set-up and machine of the study; refused where an earlier start saw something else."""
    config, experiments = bench.config, bench.experiments
    tasks_of = {**bench.any.targets, **{key: experiment.task for key, experiment in experiments.items()}}
    data = {"the data": {"data": {name: task.sources() for name, task in tasks_of.items()}}}
    # a larger draw begins with a smaller one
    note_start(bench.study, experiments, lambda name: max(config.n_measured(name), config.n_scored(name)), data)


def _work(bench: Bench, keeps_lens: bool) -> None:
    study, config, pair = bench.study, bench.config, bench.any.pair
    shape = shape_of(pair.name, pair.hf)
    costs = unit_costs(config, shape, Machine.assumed(str(pair.device), pair.dtype.itemsize))
    steps = [step_of(bench, unit) for unit in costs]

    def do(step: Step, place: str, rest: Sequence[Step]) -> None:
        fresh, start = not step.is_begun(), time.perf_counter()
        worked = step.do() is not False
        seconds = time.perf_counter() - start
        if worked and fresh and costs[step.what].seconds:
            # what was copied, or begun by a process that was killed, would make the others look faster than they are
            study.add_measured(step.stage, seconds, costs[step.what].seconds)
        left = remaining(costs, study.measured(), [step.what for step in rest])
        log.info("%s %s: %s; %s", place, step.what, duration(seconds), left)

    work(steps, pair, keeps_lens, do)
    for cell in study.cells(config):
        finish(bench, cell)


def _report(study: Study) -> None:
    """Markdown and page. What was measured is safe already: a report that fails is made again by the same command."""
    report = write_report(study.path)
    # found by name when it is needed: the library does not depend on its analyses
    importlib.import_module("spd_lens.analysis.paper.study_page").write_page(study.path, report)
