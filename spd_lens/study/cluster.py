"""`run_parts`: a study whose parts are made by workers, on this machine, a Ray cluster or SLURM, and put together."""

from __future__ import annotations

import contextlib
import importlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from spd_lens.errors import DamagedFile, SPDError, one_line
from spd_lens.files import Store, damage, forget, make_directory, publish, scratch_directory
from spd_lens.output import set_up_logging
from spd_lens.study.config import StudyConfig
from spd_lens.study.engine import checked_experiments, conclude
from spd_lens.study.folder import Study
from spd_lens.study.parts import (
    COMPARED,
    Manifest,
    Part,
    Record,
    differs,
    files_at,
    make_part,
    parts_of,
    units_of,
    unlike,
)

log = logging.getLogger(__name__)

RETRIES = 2
"""How often a part is tried again whose worker failed or was lost."""
_WAIT = 0.2
"""Seconds between two looks at the workers."""


class Job(Protocol):
    """A part at work, as `concurrent.futures`, Ray and submitit have it."""

    def done(self) -> bool:
        """Whether the worker has ended, however it ended."""

    def result(self) -> str | None:
        """What `make_part` returned; raises where the worker was lost."""


Submit = Callable[[str, Part], Job]
"""Give a part of the study in a store (its URL) to a worker."""
Workers = Callable[[Path], AbstractContextManager[Submit]]
"""Open a set of workers for the study in a folder; those still at work are stopped at the end."""


@contextlib.contextmanager
def here(folder: Path) -> Iterator[Submit]:
    """Workers that are this process itself, one part after the other."""

    def submit(url: str, part: Part) -> Job:
        job: Future[str | None] = Future()
        job.set_result(make_part(url, part))
        return job

    yield submit


def on_ray(address: str, **options: Any) -> Workers:
    """Workers on a Ray cluster.

    Args:
        address: Its address, `auto` for the one that this machine belongs to, or `local` to start one here.
        options: Of each part, as Ray has them: `num_cpus` (1), `num_gpus` (1 where the cluster has GPUs), `resources`.
    """

    @contextlib.contextmanager
    def workers(folder: Path) -> Iterator[Submit]:
        ray = _imported("ray")
        began = not ray.is_initialized()
        if began:
            how: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
            try:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR", **how)
            except Exception as error:  # a node that does not start in time raises no more than that
                raise SPDError(
                    f"no Ray cluster answers at {address!r} ({one_line(error)}); give the address of one, or local"
                ) from error
        try:
            chosen = {"num_gpus": min(1, ray.cluster_resources().get("GPU", 0)), **options}
            try:
                remote = ray.remote(_work_alone).options(max_retries=0, **chosen)
            except (ValueError, TypeError) as error:
                raise SPDError(f"Ray takes no such options for a worker: {one_line(error)}") from error
            yield lambda url, part: remote.remote(url, part).future()
        finally:
            if began:
                ray.shutdown()

    return workers


def on_submitit(cluster: str, **options: Any) -> Workers:
    """Workers that are jobs of SLURM, or processes of this machine.

    Args:
        cluster: `slurm` or `local`.
        options: Of each job, as submitit has them: `timeout_min` (a day), `gpus_per_node`, `mem_gb`, `slurm_partition`.
    """

    @contextlib.contextmanager
    def workers(folder: Path) -> Iterator[Submit]:
        submitit = _imported("submitit")
        try:
            executor = submitit.AutoExecutor(folder=folder / ".jobs", cluster=cluster)
            executor.update_parameters(**{"name": "spd-lens", "timeout_min": 24 * 60, **options})
        except (ValueError, RuntimeError, NameError, AssertionError) as error:
            raise SPDError(f"submitit cannot give jobs to {cluster!r}: {one_line(error)}") from error
        jobs: list[Any] = []

        def submit(url: str, part: Part) -> Job:
            jobs.append(executor.submit(_work_alone, url, part))
            return jobs[-1]

        try:
            yield submit
        finally:
            for job in jobs:
                if not job.done():
                    job.cancel()

    return workers


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise SPDError(f"{package} is not installed; pip install 'spd-lens[cluster]' installs it") from error


def _work_alone(url: str, part: Part) -> str | None:
    """`make_part` in a process of its own, whose log is the worker's."""
    set_up_logging(quiet=False)
    return make_part(url, part)


def run_parts(
    config: StudyConfig,
    out: str | Path,
    workers: Workers = here,
    *,
    store: str | None = None,
    at_once: int | None = None,
) -> Study:
    """A study as `run_study` makes it, by workers that take its parts: the base, each source's extractions, each cell.

    Everything that is made goes into a store, and from there into the study's folder, every file checked by its sha256.
    A part that fails, or whose worker is lost, is tried again twice, and goes on behind its last finished unit. In
    float32, on machines that compute alike, the files are those of a single process. A study that was begun by
    `run_study` goes on.

    Args:
        config: The study.
        out: Its folder.
        workers: Who does the work.
        store: A place that all workers reach, as a directory or a URL; None: `.store` in the study's folder.
        at_once: Most parts that are at work at the same time; None: as many as the workers take.

    Raises:
        SPDError: as `run_study`; a store that cannot be written, or of another study; and in the end, with the report
            of all that is there, where parts could not be made.
    """
    study = Study(out)
    place = Store(store if store is not None else study.path / ".store")
    config = _admitted(study, place, config)
    checked_experiments(_anywhere(config), study.path)
    if store is not None:
        place.check()
    with study.working():
        config = _admitted(study, place, config)
        with workers(study.path) as submit:
            study.begin(config)
            gathering = _Gathering(study, place, config)
            gathering.begin()
            failed = _work(gathering, submit, at_once)
        gathering.conclude(failed)
    return study


def assemble(store: str, out: str | Path) -> Study:
    """What is finished of the study in a store, as a study's folder with its report; nothing is computed.

    Raises:
        SPDError: there is no study in the store, or another one in the folder; and in the end, with the report of all
            that is there, where parts are missing.
    """
    study, place = Study(out), Store(store)
    record = Record.of(place)
    if record is None:
        raise SPDError(f"there is no study in {place.url}; give a study's file or --preset to begin one")
    with study.working():
        config = study.admits(StudyConfig.make(record.settings))
        study.begin(config)
        gathering = _Gathering(study, place, config)
        gathering.check(record)
        missing = {part: why for part in parts_of(config) if (why := gathering.collect(part)) is not None}
        gathering.conclude(missing)
    return study


def _admitted(study: Study, place: Store, config: StudyConfig) -> StudyConfig:
    """The settings with which folder and store go on, or `SPDError`; writes nothing."""
    config = study.admits(config)
    if (record := Record.of(place)) is None:
        return config
    earlier = StudyConfig.make(record.settings)
    if phrases := config.extended(earlier):
        raise SPDError(
            f"{place.url} holds a study with other settings ({'; '.join(phrases)}); methods and seeds can be added to "
            "it, for anything else choose another --store"
        )
    return config.after(earlier)


def _anywhere(config: StudyConfig) -> StudyConfig:
    """The study for a machine that does none of the work, and need not have the workers' device."""
    return config.model_copy(update={"settings": {**config.settings, "device": "auto"}})


@dataclass
class _Gathering:
    """A study that is put together from the parts in a store."""

    study: Study
    store: Store
    config: StudyConfig

    def begin(self) -> None:
        """Record the study in the store, with what is in the folder and not there: a study goes on where it was."""
        notes = {key: value for key, value in self.study.notes.items() if key not in ("measured", "continued_with")}
        record = Record.of(self.store)
        self.check(record)
        known = (record.notes if record else {}) or {key: notes[key] for key in COMPARED if key in notes}
        Record(settings=self.config.model_dump(mode="json"), notes=known).write(self.store)
        for part in parts_of(self.config) if notes.get("weights") else ():
            names = files_at(self.study.path, part.pattern)
            if names and not Manifest.of(self.store, part).files:
                Manifest(files=self.store.put(self.study.path, names), notes=notes).write(self.store, part)

    def check(self, record: Record | None) -> None:
        """Raise `SPDError` where the folder was begun with something else than the store says."""
        notes = self.study.notes
        if record is not None and notes.get("weights") and (phrases := unlike(notes, record.notes)):
            raise SPDError(
                f"{self.study.path} was not begun with what the study in {self.store.url} was begun with "
                f"({'; '.join(phrases)}); choose another --out or another --store"
            )

    def collect(self, part: Part) -> str | None:
        """Put a part's files into the folder. Returns why not, in words; None if all are there and whole."""
        manifest, record = Manifest.of(self.store, part), Record.of(self.store)
        if not {str(unit) for unit in units_of(self.config, part)} <= set(manifest.units):
            return "it is not finished" if manifest.files else "it was not begun"
        if record is not None and (phrases := manifest.unlike(record.notes)):
            return differs(self.store, manifest.host, phrases)
        if foreign := [name for name in manifest.files if not name.startswith(f"{part.path.partition('/')[0]}/")]:
            return f"its manifest names the file {foreign[0]!r}, which is not a part's"
        # every cell has the projection that it was made with, whatever its source has made since
        own = {name: entry for name, entry in manifest.files.items() if part.method or name.count("/") == 1}
        new = {name: entry for name, entry in own.items() if damage(self.study.path, {name: entry}) is not None}
        with scratch_directory(self.study.path / "part") as scratch:  # all of a part, or nothing
            try:
                self.store.get(new, scratch)
            except DamagedFile as error:
                return str(error)
            for name in new:
                make_directory((self.study.path / name).parent)
                forget(self.study.path / name)
                publish(scratch / name, self.study.path / name)
        self._note(manifest.notes, record)
        return None

    def conclude(self, missing: dict[Part, str]) -> None:
        """The report of what is there; then `SPDError` where parts are missing, for the reasons given."""
        parts = parts_of(self.config)
        if any(part.method and part not in missing for part in parts):  # there are results
            conclude(self.study)
        if missing:
            reasons = "; ".join(f"{part} ({why})" for part, why in missing.items())
            raise SPDError(
                f"{len(missing)} of {len(parts)} parts of the study in {self.study.path} are missing: {reasons}. "
                "The report there is about the rest; the same command goes on"
            )

    def _note(self, notes: dict[str, Any], record: Record | None) -> None:
        """The first part says what all others must have; of the others, what they were computed on is noted."""
        if not self.study.notes.get("weights"):
            self.study.note(**notes)
        self.study.note_environment({key: notes[key] for key in ("versions", "machine")})
        if record is not None and not record.notes:
            record.model_copy(update={"notes": notes}).write(self.store)


def _work(gathering: _Gathering, submit: Submit, at_once: int | None) -> dict[Part, str]:
    """Give parts to workers until all are made or given up. Returns why, for those that were given up."""
    parts = parts_of(gathering.config)
    waiting = [part for part in parts if gathering.collect(part) is not None]
    log.info("%d of %d parts to make", n := len(waiting), len(parts))
    running: dict[Part, Job] = {}
    tries: Counter[Part] = Counter()
    failed: dict[Part, str] = {}
    while waiting or running:
        pending = {part.source for part in (*waiting, *running) if not part.method}  # whose extractions are to come
        ready = [part for part in waiting if not part.method or part.source not in pending]
        for part in ready[: None if at_once is None else max(0, at_once - len(running))]:
            waiting.remove(part)
            running[part] = submit(gathering.store.url, part)
            tries[part] += 1
        ended = [part for part, job in running.items() if job.done()]
        for part in ended:
            why = _failure(running.pop(part)) or gathering.collect(part)
            if why is None:
                log.info("[%d/%d] %s", n - len(waiting) - len(running) - len(failed), n, part)
            elif tries[part] <= RETRIES:
                log.warning("%s is tried again: %s", part, why)
                waiting.append(part)
            else:
                failed[part] = why  # cells of a source that failed make for themselves what it lacks
        if running and not ended:
            time.sleep(_WAIT)
    return failed


def _failure(job: Job) -> str | None:
    """Why a job that has ended did not do its work, in words; None if it says that it did."""
    try:
        return job.result()
    except Exception as error:  # whatever ended the worker: it was killed, its machine is gone, a package failed
        return f"its worker was lost ({one_line(error)})"
