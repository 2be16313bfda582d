"""The stages of a study, one function each: what a unit makes, unless it is there or another cell has made the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from spd_lens import methods
from spd_lens.corpus import Corpus, Header, corpus_digest, settings_path
from spd_lens.evaluation import EvalResult, Policy, evaluate, teacher_forced
from spd_lens.evaluation.forced import ForcedItem
from spd_lens.examples import Example
from spd_lens.generation import generate
from spd_lens.methods import Workshop
from spd_lens.models import ModelPair
from spd_lens.models.adapter_files import adapter_digest
from spd_lens.pipeline import finetune_with
from spd_lens.publishing import replacing
from spd_lens.sampling import Sampling
from spd_lens.storage import is_made, read_json, write_json
from spd_lens.study.config import BASE, StudyConfig
from spd_lens.study.folder import Cell, Study
from spd_lens.tasks import Task


@dataclass(frozen=True)
class Bench:
    """What every stage works with: one model and one set of tasks for all cells."""

    study: Study
    config: StudyConfig
    pair: ModelPair
    sources: Mapping[str, Task]
    targets: Mapping[str, Task]
    texts: Mapping[str, list[Example]]
    """Sets of texts on which side effects are measured."""
    names: Mapping[str, str]
    """Sources as the settings write them, by the name of their folder."""
    progress: bool = False

    def workshop(self, cell: Cell) -> Workshop:
        """What the cell's method works from; all methods and seeds of a source share its extractions."""
        assert cell.seed is not None
        config = self.config.cell(self.names[cell.source], cell.seed)
        return Workshop(self.pair, self.sources[cell.source], config, self.study.path / cell.source, self.progress)

    def cells(self, source: str, seed: int | None = None) -> list[Cell]:
        """Of one source, with one seed or all."""
        found = (cell for cell in self.study.cells(self.config) if cell.source == source)
        return [cell for cell in found if seed is None or cell.seed == seed]

    def items(self, target: str) -> list[Example]:
        """Test items that are measured teacher-forced: those with spans."""
        n, seed = self.config.n_measured(target), self.config.shared.data_seed
        return [item for item in self.targets[target].test(n, seed) if item.spans]


def project(bench: Bench, cell: Cell) -> None:
    """The subspace and strength that the method generates under; `projection.json` is written last."""
    found = methods.get(cell.method).projection(bench.workshop(cell))
    if found is not None:
        found.subspace.save(cell.subspace_path)
    digest = None if found is None else cell.subspace.digest()  # as it is read back
    write_json(cell.path / "projection.json", {"digest": digest, "strength": None if found is None else found.strength})


def self_generate(bench: Bench, cell: Cell) -> bool:
    """The corpus (Eq. 13). Returns whether it had to be generated: a method that would write the same is copied."""
    if not cell.has_projection:  # a method without one has no unit of stage `extract`
        project(bench, cell)
    workshop = bench.workshop(cell)
    sampling = dict(methods.get(cell.method).sampling(workshop))
    if not cell.corpus_path.exists() and (twin := _same_corpus(bench, cell, sampling)) is not None:
        _copy_corpus(twin.corpus_path, cell.corpus_path)
        return False
    config, under = workshop.config, cell.projection
    generate(
        bench.pair,
        workshop.task.train(config.n_train, config.data_seed),
        subspace=cell.subspace if under else None,
        strength=under[1] if under else 1.0,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        batch_size=config.generation_batch_size,
        path=cell.corpus_path,
        progress=bench.progress,
        **_sampling_options(sampling),
    )
    return True


def _sampling_options(sampling: Mapping[str, Any]) -> dict[str, Any]:
    return {name: sampling.get(name) for name in ("temperature", "top_p", "top_k")}


def _same_corpus(bench: Bench, cell: Cell, sampling: Mapping[str, Any]) -> Cell | None:
    """Another method's cell, same source and seed, whose corpus was generated in just this way."""
    wanted: dict[str, Any] = Sampling.resolve(bench.pair, **_sampling_options(sampling)).to_dict()
    wanted["subspace"], wanted["strength"] = cell.projection or (None, None)
    for other in bench.cells(cell.source, cell.seed):
        if other.method != cell.method and other.has_corpus:
            settings = Header.read(other.corpus_path).settings
            if all(settings.get(name) == value for name, value in wanted.items()):
                return other
    return None


def _copy_corpus(there: Path, here: Path) -> None:
    # the settings first: there is never a corpus of unknown settings
    for source, target in ((settings_path(there), settings_path(here)), (there, here)):
        with replacing(target) as scratch:
            shutil.copyfile(source, scratch)


def distil(bench: Bench, cell: Cell) -> None:
    """The adapter (Eq. 14), trained on what the method keeps of its corpus."""
    kept = methods.get(cell.method).curated(Corpus.load(cell.corpus_path))
    config = bench.workshop(cell).config
    finetune_with(config, bench.pair, kept, cell.adapter, progress=bench.progress)


def measure(bench: Bench, cells: Sequence[Cell], name: str, items: Sequence[Example], *, side: bool = False) -> None:
    """Teacher-forced effects of several cells on the same items, in one pass over the base model.

    After training, and under the projection before any training; a projection that several cells have in common (other
    seeds of a method whose subspace no seed changes) is measured once.
    """
    missing = [cell for cell in cells if not is_made(cell.effects_path(name, side=side), read_json)]
    if not missing or not items:
        return
    policies = {}
    known: dict[str, list[ForcedItem]] = {}
    for cell in missing:
        policies[cell.method] = Policy(cell.method, adapter=None if cell.method == BASE else cell.adapter)
        under = cell.projection
        if under is not None and (key := _name(under)) not in {**known, **policies}:
            earlier = _measured_projection(bench, cell, name, side)
            if earlier is not None:
                known[key] = earlier
            else:
                policies[key] = Policy(key, cell.subspace, under[1])
    found = known | teacher_forced(bench.pair, items, list(policies.values()), progress=bench.progress)
    for cell in missing:
        phases = {"trained": found[cell.method]}
        if (under := cell.projection) is not None:
            phases["projected"] = found[_name(under)]
        record = {phase: [asdict(item) for item in rows] for phase, rows in phases.items()}
        write_json(cell.effects_path(name, side=side), record)


def _name(projection: tuple[str, float]) -> str:
    """Names a projection by what it does; no method has such a name."""
    return f"projected {projection[0]} {projection[1]}"


def _same_projection(bench: Bench, cell: Cell) -> Iterator[Cell]:
    """Other cells of the source that generate under the same projection."""
    for other in bench.cells(cell.source):
        if other.path != cell.path and other.has_projection and other.projection == cell.projection:
            yield other


def _measured_projection(bench: Bench, cell: Cell, name: str, side: bool) -> list[ForcedItem] | None:
    for other in _same_projection(bench, cell):
        if is_made(other.effects_path(name, side=side), read_json):
            return other.effects(name, side=side)["projected"]
    return None


def score(bench: Bench, cell: Cell, target: str, phase: str) -> bool:
    """Greedy completions and their scores. Returns whether there was anything to do."""
    path = cell.result_path(target, phase)
    under = cell.projection
    if phase == "projected":
        if under is None:
            return False
        for other in _same_projection(bench, cell):
            if is_made(other.result_path(target, phase), EvalResult.load):
                replace(other.result(target, phase), policy=cell.method).save(path)
                return False
    config = bench.config.shared
    applied: dict[str, Any] = {}
    if phase == "projected" and under is not None:
        applied = {"subspace": cell.subspace, "strength": under[1]}
    elif cell.method != BASE:
        applied = {"adapter": cell.adapter}
    measured = cell.effects_path(target).exists()
    evaluate(
        bench.pair, bench.targets[target], bench.config.n_scored(target), seed=config.data_seed, name=cell.method,
        batch_size=config.generation_batch_size, path=path.with_suffix(".jsonl"), progress=bench.progress,
        forced=cell.effects(target)[phase] if measured else [], **applied,
    ).save(path)  # fmt: skip
    return True


def finish(bench: Bench, cell: Cell) -> None:
    """Mark a cell that has everything, with short names of what it was made of."""
    phases = ["trained", *(["projected"] if bench.config.score_projected and cell.projection else [])]
    wanted = [cell.effects_path(name) for name in bench.targets if bench.items(name)]
    wanted += [cell.effects_path(name, side=True) for name in bench.texts]
    wanted += [cell.result_path(name, phase) for name in bench.targets for phase in phases]
    if cell.done or not all(path.exists() for path in wanted):
        return
    corpus = Corpus.load(cell.corpus_path)
    kept = methods.get(cell.method).curated(corpus)
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
        },
    )
