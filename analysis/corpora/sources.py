"""Where corpora that stand side by side come from: a study, a run, or files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from spd_lens import methods as registry
from spd_lens import tasks
from spd_lens.errors import SPDError
from spd_lens.generation import Corpus, Record
from spd_lens.runs import Run, make_tasks
from spd_lens.study import Study
from spd_lens.tasks import Task

Corpora = Mapping[str, Sequence[Record]]
"""Corpora by method; the first is what the others are compared with."""

_PLAIN = ("psr", "psr-reference")
"""The methods that the others are compared with if one was run: the model's own raw outputs."""


@dataclass(frozen=True)
class CorporaSet:
    """Corpora of one source task."""

    title: str
    corpora: Corpora
    """What is measured; the seeds of one method count as samples of the same prompts."""
    shown: Corpora
    """What is read: the corpora of one seed."""
    task: Task | None
    null: Sequence[Record] | None
    """The first method's corpus with another seed."""
    controls: tuple[str, ...]
    folder: Path
    name: str
    """Name of the files in `folder`."""


def shared_prompts(corpora: Corpora) -> dict[str, list[Record]]:
    """Completions of the prompts that all corpora answer, by corpus, in the first one's order.

    Raises `SPDError` for fewer than two corpora, or no prompt in common.
    """
    if len(corpora) < 2:
        raise SPDError(f"a comparison needs two corpora or more, and there is {', '.join(corpora) or 'none'}")
    first, *others = ({record.id: record.prompt for record in corpus} for corpus in corpora.values())
    common = [id for id, text in first.items() if all(other.get(id) == text for other in others)]
    if not common:
        raise SPDError(f"the corpora {', '.join(corpora)} have no prompt in common, so they cannot stand side by side")
    place = {id: i for i, id in enumerate(common)}
    return {
        name: sorted((r for r in corpus if r.id in place), key=lambda record: (place[record.id], record.sample))
        for name, corpus in corpora.items()
    }


def pooled(corpora: Iterable[Sequence[Record]]) -> list[Record]:
    """Several seeds of one method as samples of the same prompts."""
    records: list[Record] = []
    for corpus in corpora:
        step = 1 + max((record.sample for record in records), default=-1)
        records += [replace(record, sample=step + record.sample) for record in corpus]
    return records


def corpora_sets(
    places: Sequence[str],
    *,
    methods: str | None = None,
    seed: int | None = None,
    task: str | None = None,
    data_dir: Path | None = None,
    out: Path | None = None,
) -> Iterator[CorporaSet]:
    """What the command compares: every source of every study, every run, and all `NAME=FILE` together.

    Raises `SPDError` for a place that is none of these, or has fewer than two corpora.
    """
    files = [place for place in places if place.endswith(".jsonl")]
    for place in places:
        if place in files:
            continue
        if (Path(place) / "study.yaml").exists():
            yield from _of_study(Study.open(place), methods, seed, out)
        else:
            yield _of_run(Run.open(place), out)
    if files:
        known = tasks.get(task, data_dir) if task is not None else None
        corpora = _of_files(files)
        yield CorporaSet(", ".join(corpora), corpora, corpora, known, None, (), out or Path("corpora"), "corpora")


def _of_files(files: Sequence[str]) -> Corpora:
    corpora: dict[str, Corpus] = {}
    for file in files:
        name, named, path = file.partition("=")
        name, path = (name, path) if named else (Path(file).stem, file)
        if name in corpora:
            raise SPDError(f"two of the corpora are called {name!r}; give them names, as in spd=a.jsonl psr=b.jsonl")
        corpora[name] = Corpus.load(path)
    return corpora


def _of_run(run: Run, out: Path | None) -> CorporaSet:
    """A run has the same prompts with the same noise, without the projection and with it."""
    corpora: Corpora = {"base": run.unprojected, "spd": run.corpus}
    source, _ = make_tasks(run.config)
    folder = out or run.path / "analysis"
    return CorporaSet(run.path.resolve().name, corpora, corpora, source, None, (), folder, "corpora")


def _of_study(study: Study, methods: str | None, seed: int | None, out: Path | None) -> Iterator[CorporaSet]:
    config = study.config
    if seed is not None and seed not in config.seeds:
        raise SPDError(f"{study.path} has no seed {seed}; it has {', '.join(map(str, config.seeds))}")
    first = config.seeds[0] if seed is None else seed
    cells = [cell for cell in study.cells(config) if cell.has_corpus]
    for source in dict.fromkeys(cell.source for cell in cells):
        own: dict[str, dict[int | None, Corpus]] = {}
        for cell in cells:
            if cell.source == source:
                own.setdefault(cell.method, {})[cell.seed] = Corpus.load(cell.corpus_path)
        own = {name: own[name] for name in _chosen(list(own), methods) if first in own[name]}
        if len(own) < 2:
            raise SPDError(f"{study.path} has no two finished corpora of {source} with seed {first}; let it go on")
        reference = own[next(iter(own))]
        null = next((corpus for other, corpus in reference.items() if other != first), None)
        task = next(name for name in config.sources if name == source or Path(name).stem == source)
        yield CorporaSet(
            f"{source} in {study.path.resolve().name}",
            {name: pooled(seeds.values()) for name, seeds in own.items()},
            {name: seeds[first] for name, seeds in own.items()},
            make_tasks(config.cell(task, first))[0],
            null,
            tuple(name for name in own if registry.get(name).is_control),
            out or study.path / "analysis",
            f"corpora-{source}",
        )


def _chosen(there: list[str], wanted: str | None) -> list[str]:
    """The methods to show, the reference first."""
    if wanted is None:
        return sorted(there, key=lambda name: name not in _PLAIN)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in names:
        if name not in there:
            raise SPDError(f"there is no finished corpus of method {name!r}; there are {', '.join(there)}")
    return names
