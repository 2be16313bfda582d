"""`run_study`: every unit of the plan in its order, each made once, however often the study is stopped."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from spd_lens import tasks
from spd_lens.evaluation import EvalResult
from spd_lens.files import is_made, read_json
from spd_lens.models import ModelPair, neutral
from spd_lens.runs import (
    Draws,
    Experiment,
    allow_execution,
    check_data,
    check_model,
    decided_by,
    left_out,
    note_model,
    note_set_up,
    ready_pair,
)
from spd_lens.study.config import BASE, StudyConfig, named
from spd_lens.study.costs import Machine, Unit
from spd_lens.study.folder import Cell, Study
from spd_lens.study.plan import Clock, duration, schedule, unit_costs
from spd_lens.study.results import write_tables
from spd_lens.study.shapes import shape_of
from spd_lens.study.side_effects import side_effect_examples
from spd_lens.study.stages import Bench, distil, finish, measure, project, score, self_generate
from spd_lens.subspaces import Subspace
from spd_lens.training import is_finished

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
        config = StudyConfig.read(
            overrides={**config.model_dump(), "settings": {**config.settings, **decided_by(pair)}}
        )
    config = Study(out).admits(config)
    experiments = experiments_of(config, Path(out), progress)
    _check(config, experiments)
    side_effect_examples(config)
    keeps_lens = pair is not None and pair.has_lens
    pair = ready_pair(pair, config.shared, Study(out))
    for experiment in experiments.values():
        experiment.pair = pair
    _check_model(config, experiments)
    study = Study(out)
    with study.locked():
        config = study.admits(config)  # another process may have begun a study meanwhile
        texts = side_effect_examples(config, pair)
        if study.is_free:
            study.begin(config)  # the first file: whatever is killed from now on, this is a study
        bench = Bench(study, config, experiments, texts)
        _note(bench)
        study.begin(config)  # or it has grown
        _work(bench, keeps_lens)
        write_tables(study.path)
        _report(study)
    return study


def experiments_of(config: StudyConfig, path: Path, progress: bool = False) -> dict[str, Experiment]:
    """The experiment of each source, with the first seed, by the name that its results are kept under.

    A task that is source and target, or source of one experiment and target of another, is made once.
    """
    shared = config.shared
    made = {
        name: tasks.configured(name, shared.data_dir, config.task_options.get(name, {}))
        for name in dict.fromkeys([*config.sources, *config.targets])
    }
    allow_execution(shared, made.values())
    targets = {key: made[name] for key, name in shared.targets.items()}
    return {
        key: Experiment(
            config.cell(name, config.seeds[0]), path / key, tasks=(made[name], targets), progress=progress, shared=True
        )
        for key, name in named(config.sources).items()
    }


def _check(config: StudyConfig, experiments: Mapping[str, Experiment]) -> None:
    """What can be refused without a model: sizes that the data do not have, tasks that cannot be scored here."""
    for experiment in experiments.values():
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
    study, config, pair, targets = bench.study, bench.config, bench.any.pair, bench.any.targets
    note_model(study, pair)
    sources = {key: experiment.task for key, experiment in bench.experiments.items()}
    data = {name: task.sources() for name, task in {**targets, **sources}.items()}
    study.note_once("the data", data=data)
    note_set_up(study, config.shared, pair)
    draws: Draws = {
        "calibration": {key: (own.task, own.config.n_calibration) for key, own in bench.experiments.items()},
        "train": {key: (own.task, own.config.n_train) for key, own in bench.experiments.items()},
        "test": {
            # a larger draw begins with a smaller one
            name: (task, max(config.n_measured(name), config.n_scored(name)))
            for name, task in targets.items()
        },
    }
    if counts := left_out(pair, config.shared, draws):
        study.note_once("the choice of texts that fit", left_out=counts)
    study.note_environment()


def _work(bench: Bench, keeps_lens: bool) -> None:
    study, config, pair = bench.study, bench.config, bench.any.pair
    units = schedule(config)
    shape = shape_of(pair.name, pair.hf.config, sum(p.numel() for p in pair.hf.parameters()))
    costs = unit_costs(config, shape, Machine.assumed(str(pair.device), pair.dtype.itemsize))
    todo = [unit for unit in units if not _done(bench, unit)]
    log.info("%d of %d units to do", len(todo), len(units))
    for place, unit in enumerate(todo):
        if unit.stage != "extract" and not keeps_lens:
            pair.drop_lens()  # only extraction looks at the lens model
        fresh = not _begun(bench, unit)
        start = time.perf_counter()
        worked = _do(bench, unit)
        seconds = time.perf_counter() - start
        if worked and fresh and costs[unit].seconds:
            # what was copied, or begun by a process that was killed, would make the others look faster than they are
            study.add_measured(unit.stage, seconds, costs[unit].seconds)
        clock = Clock(costs, {stage: dict(entry) for stage, entry in study.measured().items()})
        left = clock.remaining(todo[place + 1 :])
        log.info("[%d/%d] %s: %s; %s", place + 1, len(todo), unit, duration(seconds), left)
    for cell in study.cells(config):
        finish(bench, cell)


def _cells(bench: Bench, unit: Unit) -> list[Cell]:
    """The cells that a unit works on: one, or all methods of a source and seed."""
    if unit.method == BASE:
        return [bench.study.base()]
    assert unit.seed is not None
    if unit.method:
        return [bench.study.cell(unit.source, unit.method, unit.seed)]
    return bench.cells(unit.source, unit.seed)


def _done(bench: Bench, unit: Unit) -> bool:
    cells = _cells(bench, unit)

    def measured(cell: Cell, name: str, *, side: bool = False) -> bool:
        return is_made(cell.effects_path(name, side=side), read_json)

    checks: dict[str, Callable[[Cell], bool]] = {
        "extract": lambda cell: (
            cell.has_projection and (cell.projection is None or is_made(cell.subspace_path, Subspace.load))
        ),
        "generate": lambda cell: cell.has_corpus,
        "finetune": lambda cell: is_finished(cell.adapter),
        "measure": lambda cell: not bench.items(unit.target) or measured(cell, unit.target),
        "side effects": lambda cell: all(measured(cell, name, side=True) for name in bench.texts),
        "score": lambda cell: (
            is_made(cell.result_path(unit.target, unit.phase), EvalResult.load)
            or (unit.phase == "projected" and cell.has_projection and cell.projection is None)
        ),
    }
    return all(checks[unit.stage](cell) for cell in cells)


def _begun(bench: Bench, unit: Unit) -> bool:
    """Whether a process that was killed has done a part of it."""
    cells = _cells(bench, unit)
    if unit.stage == "generate":
        return cells[0].corpus_path.exists()
    if unit.stage == "finetune":
        return cells[0].adapter.with_name("adapter.training").exists()
    if unit.stage == "measure":
        return any(cell.effects_path(unit.target).exists() for cell in cells)
    if unit.stage == "side effects":
        return any(cell.effects_path(name, side=True).exists() for cell in cells for name in bench.texts)
    if unit.stage == "score":
        return cells[0].result_path(unit.target, unit.phase).with_suffix(".jsonl").exists()
    return False


def _do(bench: Bench, unit: Unit) -> bool:
    """Returns whether it was real work."""
    cells = _cells(bench, unit)
    if unit.stage == "measure":
        measure(bench, cells, unit.target, bench.items(unit.target))
    elif unit.stage == "side effects":
        for name, items in bench.texts.items():
            measure(bench, cells, name, items, side=True)
    elif unit.stage == "extract":
        project(bench, cells[0])
    elif unit.stage == "generate":
        return self_generate(bench, cells[0])
    elif unit.stage == "finetune":
        distil(bench, cells[0])
    else:
        return score(bench, cells[0], unit.target, unit.phase)
    return True


def _report(study: Study) -> None:
    """Markdown and page. What was measured is safe already: a report that fails is made again by the same command."""
    from spd_lens.study.reporting.report import write_report

    report = write_report(study.path)
    # found by name when it is needed: the library does not depend on its analyses
    importlib.import_module("spd_lens.analysis.paper.study_page").write_page(study.path, report)
