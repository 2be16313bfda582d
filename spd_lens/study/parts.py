"""`Part`: a piece of a study that one worker makes by itself, in a folder of its own, and leaves in a store.

What a worker has made is a manifest in the store: the units that are done, the files with their sha256, and what they
were made with. It is written anew after every unit, so that whoever makes the part again goes on behind the last one.
"""

from __future__ import annotations

import logging
import os
import platform
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError, field_validator

from spd_lens.errors import DamagedFile, SPDError, shortened
from spd_lens.files import Store
from spd_lens.models import neutral
from spd_lens.runs import Step, validated, work
from spd_lens.settings import Settings
from spd_lens.study.config import BASE, StudyConfig, named
from spd_lens.study.costs import Unit
from spd_lens.study.engine import begun
from spd_lens.study.folder import Study
from spd_lens.study.plan import schedule
from spd_lens.study.stages import finish, step_of

log = logging.getLogger(__name__)

COMPARED = ("versions", "code", "fingerprint", "weights", "data", "resolved", "left_out", "prompt_date")
"""What all parts of a study must have been made with. Machines may differ, and are noted."""


class Part(NamedTuple):
    """The base model, the extractions of a source, or one cell; what does not apply is empty."""

    source: str = ""
    method: str = ""
    seed: int | None = None

    def __str__(self) -> str:
        if not self.source:
            return "the base model"
        return f"{self.method} on {self.source}, seed {self.seed}" if self.method else f"extractions of {self.source}"

    @property
    def path(self) -> str:
        """The folder of what it makes, below the study's."""
        return "/".join(str(piece) for piece in self if piece not in ("", None))

    @property
    def pattern(self) -> str:
        """Its files, below the study's folder; of a source those that its cells share."""
        return f"{self.path}/**/*" if self.method else f"{self.path}/*.safetensors"


def parts_of(config: StudyConfig) -> list[Part]:
    """All parts of a study that have something to do; a source comes before its cells."""
    sources = named(config.sources)
    cells = [Part(s, method, seed) for seed in config.seeds for s in sources for method in config.trained]
    return [part for part in (Part(method=BASE), *map(Part, sources), *cells) if units_of(config, part)]


def units_of(config: StudyConfig, part: Part) -> list[Unit]:
    """The units of the study's plan that a part consists of, in the plan's order.

    A source extracts what its methods ask for with the first seed, which is all that several cells share. What the plan
    measures of all methods together is measured of a cell alone, with the same results.
    """
    units = schedule(config)
    if part.method == BASE:
        return [unit for unit in units if unit.method == BASE]
    units = [unit for unit in units if unit.source == part.source]
    if not part.method:
        return [unit for unit in units if unit.stage == "extract" and unit.seed == config.seeds[0]]
    own = [unit for unit in units if unit.seed == part.seed and unit.method in ("", part.method)]
    return [unit._replace(method=part.method) for unit in own]


class Record(Settings):
    """What a store says of its study."""

    settings: dict[str, Any]
    notes: dict[str, Any] = Field(default_factory=dict)
    """What the study was begun with; empty before the first part is collected."""

    @classmethod
    def of(cls, store: Store) -> Record | None:
        """The record of a store; None where there is no study in it."""
        found = store.read("study.json")
        return None if found is None else validated(cls, found)

    def write(self, store: Store) -> None:
        """Keep it."""
        store.write("study.json", self.model_dump(mode="json"))


class Manifest(Settings):
    """What a store says of a part."""

    units: list[str] = Field(default_factory=list)
    files: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """The `size` and `sha256` of each file, by its name below the study's folder."""
    notes: dict[str, Any] = Field(default_factory=dict)
    host: str = ""
    pid: int = 0

    @field_validator("files")
    @classmethod
    def _entries(cls, files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if any(entry.keys() != {"size", "sha256"} for entry in files.values()):
            raise ValueError("every file has a size and a sha256")
        return files

    @classmethod
    def of(cls, store: Store, part: Part) -> Manifest:
        """The manifest of a part, which is empty where nothing has been made; one that is damaged is as good as none.

        Raises:
            SPDError: the store cannot be read.
        """
        try:
            record = store.read(name := _manifest(part))
        except DamagedFile as error:
            log.warning("%s: making it again", error)
            return cls()
        try:
            return cls.model_validate(record or {})
        except ValidationError:
            log.warning("%s in %s is no manifest: making it again", name, store.url)
            return cls()

    def write(self, store: Store, part: Part) -> None:
        """Keep it."""
        store.write(_manifest(part), self.model_dump(mode="json"))

    def unlike(self, notes: Mapping[str, Any]) -> list[str]:
        """One phrase for each thing that the part was not made with and `notes` say."""
        return unlike(self.notes, notes)


def _manifest(part: Part) -> str:
    return f"manifests/{part.path}.json"


def unlike(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """One phrase for each thing of `COMPARED` that is not the same; none where `theirs` say nothing yet."""
    phrases = []
    for key in COMPARED if theirs else ():
        one, other = mine.get(key), theirs.get(key)
        if one == other or (key == "code" and None in (one, other)):  # a study of one process does not note its code
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            names = [name for name in {**other, **one} if one.get(name) != other.get(name)]
            pairs = [(f"{key} of {name}", other.get(name), one.get(name)) for name in names]
        else:
            pairs = [(key, other, one)]
        phrases += [f"{what}: {shortened(str(t))} there, {shortened(str(m))} here" for what, t, m in pairs]
    return phrases


def files_at(folder: Path, pattern: str) -> list[str]:
    """The finished files in a study's folder that a pattern matches, by their names below it."""
    whole = (path for path in sorted(folder.glob(pattern)) if path.name[0] != "." and path.suffix != ".lock")
    return [path.relative_to(folder).as_posix() for path in whole if path.is_file()]


@neutral()
def make_part(url: str, part: Part) -> str | None:
    """Make a part of the study in a store, and leave it there; what a worker does.

    Args:
        url: The store, in which the coordinator has recorded the study.
        part: The part; what an earlier worker has left of it is not made again.

    Returns:
        Why it could not be made, in a sentence; None if it was.
    """
    try:
        _make(Store(url), part)
    except SPDError as error:
        return " ".join(str(error).splitlines())
    return None


def _make(store: Store, part: Part) -> None:
    record = Record.of(store)
    if record is None:
        raise SPDError(
            f"{store.url} holds no study where the worker on {platform.node()} looks; give --store a place that all "
            "machines reach under the same address"
        )
    config = StudyConfig.make(record.settings)
    with tempfile.TemporaryDirectory(prefix="spd-lens-") as place:
        study = Study(place)
        study.begin(config)
        if "prompt_date" in record.notes:
            study.note(prompt_date=record.notes["prompt_date"])
        with begun(config, place) as bench:
            notes = {**study.notes, "code": code_digest()}
            if phrases := unlike(notes, record.notes):
                raise SPDError(differs(store, platform.node(), phrases))
            units = units_of(config, part)
            steps = [step_of(bench, unit) for unit in units]
            worker = _Worker(store, part, study, notes)
            worker.fetch(steps)
            work(steps, bench.any.pair, False, lambda step, place, rest: worker.do(step))
            if part.seed is not None:
                finish(bench, study.cell(part.source, part.method, part.seed))
            worker.publish(units)


def differs(store: Store, host: str, phrases: list[str]) -> str:
    """A sentence about a worker that has something else than the study was begun with."""
    return (
        f"the worker on {host} does not have what the study in {store.url} was begun with ({'; '.join(phrases)}); give "
        "all machines the same packages, model and data"
    )


class _Worker:
    """A part at work: what was fetched for it, and what is published of it."""

    def __init__(self, store: Store, part: Part, study: Study, notes: Mapping[str, Any]) -> None:
        self.store, self.part, self.study, self.notes = store, part, study, notes
        self.published: dict[str, dict[str, Any]] = {}
        self.shared: set[str] = set()
        """Files of the source, which are not the cell's."""
        self.done: list[Unit] = []

    def fetch(self, steps: list[Step]) -> None:
        """Get what earlier workers have made of this part, and what it needs of its source."""
        mine = Manifest.of(self.store, self.part)
        if not mine.unlike(self.notes):
            self.published = self._whole(mine.files)
        if self.part.seed is not None:
            source = Manifest.of(self.store, Part(self.part.source)).files
            mine_too = (name for name in source if name.startswith(f"{self.part.path}/"))
            self._whole({name: source[name] for name in mine_too if name not in self.published})
            if any(step.stage == "extract" and not step.is_done() for step in steps):
                self.shared |= self._whole({name: source[name] for name in source if name.count("/") == 1}).keys()
        self.done = [step.what for step in steps if step.is_done()]

    def do(self, step: Step) -> None:
        """One unit, which is then published."""
        step.do()
        log.info("%s", step.what)
        self.publish([*self.done, step.what])

    def publish(self, done: list[Unit]) -> None:
        """Store what there is, and then say so."""
        self.done = done
        names = [name for name in files_at(self.study.path, "*/**/*") if name not in self.shared]
        self.published = self.store.put(self.study.path, names, self.published)
        units, host = [str(unit) for unit in done], platform.node()
        made = Manifest(units=units, files=self.published, notes=dict(self.notes), host=host, pid=os.getpid())
        made.write(self.store, self.part)

    def _whole(self, files: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Get files that are whole; the others are made again."""
        whole = {}
        for name, entry in files.items():
            try:
                self.store.get({name: entry}, self.study.path)
                whole[name] = entry
            except DamagedFile as error:
                log.warning("%s: making it again", error)
        return whole


def code_digest() -> str:
    """sha256 of the library's code in this process's installation."""
    root = Path(__file__).parents[1]
    digest = sha256()
    for path in sorted(root.rglob("*.py")):
        if (name := path.relative_to(root)).parts[0] != "analysis":  # which makes nothing of a study
            digest.update(name.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
