"""The stages of a study, one function each: what a unit makes, unless it is there or another cell has made the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from spd_lens import methods
from spd_lens.evaluation import ForcedItem, ForcedPasses
from spd_lens.examples import Example
from spd_lens.files import replacing, write_json
from spd_lens.generation import Header, Sampling, corpus_digest, settings_path
from spd_lens.models import adapter_digest
from spd_lens.runs import Experiment, Step, score
from spd_lens.study.config import BASE, StudyConfig
from spd_lens.study.costs import Unit
from spd_lens.study.folder import Cell, Study
from spd_lens.subspaces import Policy


@dataclass(frozen=True)
class Bench:
    """A study at work: its folder, and the experiment of each source, which share one model and one set of targets."""

    study: Study
    config: StudyConfig
    experiments: Mapping[str, Experiment]
    """Experiments by the name of the source's folder."""
    texts: Mapping[str, list[Example]]
    """Sets of texts on which side effects are measured."""

    @property
    def any(self) -> Experiment:
        """One of the experiments, for what all have in common: the model, the targets, the settings of evaluation."""
        return next(iter(self.experiments.values()))

    @cached_property
    def passes(self) -> ForcedPasses:
        """What the base model computed on the items that are measured: the same for all sources, methods and seeds."""
        return ForcedPasses(self.any.pair, keep=True)

    def of(self, cell: Cell) -> Experiment:
        """What the cell's method works from; all methods and seeds of a source share its extractions."""
        assert cell.seed is not None
        return self.experiments[cell.source].with_seed(cell.seed)

    def cells(self, source: str, seed: int | None = None) -> list[Cell]:
        """The cells of one source, with one seed or all."""
        found = (cell for cell in self.study.cells(self.config) if cell.source == source)
        return [cell for cell in found if seed is None or cell.seed == seed]

    def items(self, target: str) -> list[Example]:
        """Test items that are measured teacher-forced."""
        return self.any.items(target, self.config.n_measured(target))


def step_of(bench: Bench, unit: Unit) -> Step:
    """A unit of the plan as a step, on its cell or on all cells of its source and seed."""
    if unit.method == BASE:
        cells = [bench.study.base()]
    elif unit.method:
        cells = [cell for cell in bench.cells(unit.source, unit.seed) if cell.method == unit.method]
    else:
        cells = bench.cells(unit.source, unit.seed)
    if unit.stage in ("measure", "side effects"):
        return _measuring(bench, unit, cells)
    [cell] = cells
    if unit.stage == "score":
        return _scoring(bench, unit, cell)
    is_done, do, is_begun = {
        "extract": (
            lambda: cell.has_projection and (cell.projection is None or cell.has_subspace), _project, lambda: False
        ),
        "generate": (lambda: cell.has_corpus, _self_generate, cell.corpus_path.exists),
        "finetune": (lambda: cell.is_trained, _distil, cell.adapter.with_name("adapter.training").exists),
    }[unit.stage]  # fmt: skip
    return Step(unit.stage, unit, is_done, partial(do, bench, cell), is_begun)


def _project(bench: Bench, cell: Cell) -> None:
    """The subspace and strength that the method generates under; `projection.json` is written last."""
    found = methods.get(cell.method).projection(bench.of(cell))
    digest = strength = None
    if found is not None and found.subspace is not None:
        found.subspace.save(cell.subspace_path)
        digest, strength = cell.subspace.digest(), found.strength  # as it is read back
    write_json(cell.path / "projection.json", {"digest": digest, "strength": strength})


def _self_generate(bench: Bench, cell: Cell) -> bool:
    """The corpus (Eq. 13). Returns whether it had to be generated: a method that would write the same is copied."""
    if not cell.has_projection:  # a method without one has no unit of stage `extract`
        _project(bench, cell)
    experiment = bench.of(cell)
    sampling = dict(methods.get(cell.method).sampling(experiment))
    if not cell.corpus_path.exists() and (twin := _same_corpus(bench, cell, sampling)) is not None:
        # the settings first: there is never a corpus of unknown settings
        for place in (settings_path, Path):
            with replacing(place(cell.corpus_path)) as scratch:
                shutil.copyfile(place(twin.corpus_path), scratch)
        return False
    experiment.generate(cell.corpus_path, cell.projected, sampling=sampling, saved=cell.subspace_path)
    return True


def _same_corpus(bench: Bench, cell: Cell, sampling: Mapping[str, Any]) -> Cell | None:
    """Another method's cell, same source and seed, whose corpus was generated in just this way."""
    options = {name: sampling.get(name) for name in ("temperature", "top_p", "top_k")}
    wanted: dict[str, Any] = Sampling.resolve(bench.any.pair, **options).to_dict()
    wanted["subspace"], wanted["strength"] = cell.projection or (None, None)
    for other in bench.cells(cell.source, cell.seed):
        if other.method != cell.method and other.has_corpus:
            settings = Header.read(other.corpus_path).settings
            if all(settings.get(name) == value for name, value in wanted.items()):
                return other
    return None


def _distil(bench: Bench, cell: Cell) -> None:
    """The adapter (Eq. 14), trained on what the method keeps of its corpus."""
    method, experiment = methods.get(cell.method), bench.of(cell)
    experiment.finetune(method.curated(cell.corpus), cell.adapter, training=method.training(experiment))


def _measuring(bench: Bench, unit: Unit, cells: Sequence[Cell]) -> Step:
    side = unit.stage == "side effects"
    sets = bench.texts if side else {unit.target: bench.items(unit.target)}

    def missing(name: str) -> list[Cell]:
        return [cell for cell in cells if sets[name] and not cell.has_effects(name, side=side)]

    def do() -> None:
        for name, items in sets.items():
            if own := missing(name):
                _measure(bench, own, name, items, side)

    return Step(
        unit.stage, unit, lambda: not any(map(missing, sets)), do,
        lambda: any(cell.effects_path(name, side=side).exists() for cell in cells for name in sets),
    )  # fmt: skip


def _measure(bench: Bench, cells: Sequence[Cell], name: str, items: Sequence[Example], side: bool) -> None:
    """Teacher-forced outcomes of several cells on the same items, in one pass over the base model.

    After training, and under the projection before any training; a projection that several cells have in common (other
    seeds of a method whose subspace no seed changes) is measured once.
    """
    policies: dict[str, Policy] = {}
    known: dict[str, list[ForcedItem]] = {}
    for cell in cells:
        policies[cell.method] = cell.trained
        under = cell.projection
        if under is not None and (key := _name(under)) not in {**known, **policies}:
            same = (other for other in _same_projection(bench, cell) if other.has_effects(name, side=side))
            if (other := next(same, None)) is not None:
                known[key] = other.effects(name, side=side)["projected"]
            else:
                policies[key] = Policy(key, cell.subspace, under[1])
    found = known | bench.any.measure(items, list(policies.values()), None if side else name, passes=bench.passes)
    for cell in cells:
        phases = {"trained": found[cell.method]}
        if (under := cell.projection) is not None:
            phases["projected"] = found[_name(under)]
        cell.write_effects(name, phases, side=side)


def _name(projection: tuple[str, float]) -> str:
    """Names a projection by what it does; no method has such a name."""
    return f"projected {projection[0]} {projection[1]}"


def _same_projection(bench: Bench, cell: Cell) -> Iterator[Cell]:
    """Other cells of the source that generate under the same projection."""
    for other in bench.cells(cell.source):
        if other.path != cell.path and other.has_projection and other.projection == cell.projection:
            yield other


def _scoring(bench: Bench, unit: Unit, cell: Cell) -> Step:
    target, phase = unit.target, unit.phase
    path = cell.result_path(target, phase)

    def is_done() -> bool:
        nothing_to_do = phase == "projected" and cell.has_projection and cell.projection is None
        return nothing_to_do or cell.has_result(target, phase)

    def do() -> bool:
        policy = cell.trained if phase == "trained" else cell.projected
        if policy is None:
            return False
        for other in _same_projection(bench, cell) if phase == "projected" else ():
            if other.has_result(target, phase):
                replace(other.result(target, phase), policy=cell.method).save(path)
                return False
        score(bench.any, cell, target, phase, policy)
        return True

    return Step(unit.stage, unit, is_done, do, path.with_suffix(".jsonl").exists)


def finish(bench: Bench, cell: Cell) -> None:
    """Mark a cell that has everything, with short names of what it was made of."""
    phases = ["trained", *(["projected"] if bench.config.score_projected and cell.projection else [])]
    wanted = [cell.effects_path(name) for name in bench.any.targets if bench.items(name)]
    wanted += [cell.effects_path(name, side=True) for name in bench.texts]
    wanted += [cell.result_path(name, phase) for name in bench.any.targets for phase in phases]
    if cell.done or not all(path.exists() for path in wanted):
        return
    corpus = cell.corpus
    method = methods.get(cell.method)
    kept, training = method.curated(corpus), method.training(bench.of(cell))
    write_json(
        cell.path / "done.json",
        {
            "method": cell.method,
            "source": cell.source,
            "seed": cell.seed,
            "n_generated": len(corpus),
            "n_trained_on": len(kept),
            "corpus": corpus_digest(corpus),
            "adapter": adapter_digest(cell.adapter),
            "subspace": cell.projection and cell.projection[0],
            **({"training": dict(training)} if training else {}),
        },
    )
