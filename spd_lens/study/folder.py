"""`Study`: the folder of a study and where everything lies in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spd_lens.errors import SPDError
from spd_lens.evaluation import EvalResult
from spd_lens.files import Schema, is_made, occupants, read_json, write_text
from spd_lens.runs import Artefacts, Folder, read_kept
from spd_lens.study.config import BASE, StudyConfig, named
from spd_lens.subspaces import Policy


class _Projection(Schema):
    """What a method generates under: digest and strength, or neither."""

    digest: str | None
    strength: float | None


@dataclass(frozen=True)
class Cell(Artefacts):
    """One method on one source with one seed, or the base model; its files are there once they were made."""

    path: Path
    source: str
    method: str
    seed: int | None
    """None for the base model, which has neither source nor seed."""

    def __str__(self) -> str:
        return self.method if self.seed is None else f"{self.method} on {self.source}, seed {self.seed}"

    @property
    def has_projection(self) -> bool:
        """Whether it is known what the method generates under, which may be no projection."""
        return is_made(self.path / "projection.json", lambda path: read_json(path, _Projection))

    @property
    def projection(self) -> tuple[str, float] | None:
        """Digest of the subspace and strength of the projection during generation; None where there is none."""
        if self.method == BASE:
            return None
        record = read_json(self.path / "projection.json", _Projection)
        return None if not record.digest or record.strength is None else (record.digest, record.strength)

    @property
    def projected(self) -> Policy | None:
        """What the method generates under; None where that is the model as it is."""
        under = self.projection
        return None if under is None else Policy(self.method, self.subspace, under[1])

    @property
    def trained(self) -> Policy:
        """The model that the method leaves."""
        return Policy(self.method, adapter=None if self.method == BASE else self.adapter)

    def result_path(self, task: str, policy: str = "trained") -> Path:
        """The file of the scored completions of a target's items; `policy` is `trained` or `projected`."""
        return self.path / ("eval" if policy == "trained" else "eval-projected") / f"{task}.json"

    def result(self, task: str, policy: str = "trained") -> EvalResult:
        """Every item's completion and score."""
        return EvalResult.load(self.result_path(task, policy))

    @property
    def done(self) -> bool:
        """Whether all that the study asks of this cell has been made."""
        return is_made(self.path / "done.json", read_json)


_FIRST_NOTES = frozenset({"fingerprint", "weights", "data", "resolved", "left_out", "versions", "machine"})
"""Keys that earlier versions noted before they wrote the settings."""


class Study(Folder):
    """A study's folder. `Study.open` for one that exists; `run_study` makes and continues them.

    | file | what |
    | --- | --- |
    | `study.yaml` | the settings |
    | `manifest.json` | size, sha256 and stage of every finished file |
    | `study.json` | versions, machine, weights, resolved sampling, seconds per stage |
    | `SOURCE/moments-*.safetensors` | extractions, shared by methods and seeds |
    | `SOURCE/METHOD/SEED/` | one `Cell`: projection, corpus, adapter, effects, scored completions |
    | `base/` | the base model, measured once |
    | `findings.json` | what the cells say of every subspace and adapter: their grades follow from it |
    | `results.csv`, `corpora.csv` | one row per item and measure; one per corpus |
    """

    kind = "study"
    settings_file = "study.yaml"
    notes_file = "study.json"

    @property
    def is_free(self) -> bool:
        """Whether a new one may begin here, also where a process was killed before it had begun one."""
        there = occupants(self.path, self.settings_file, self.notes_file)
        if [place.name for place in there] == [self.notes_file]:
            return set(self.notes) <= _FIRST_NOTES
        return not there

    @property
    def config(self) -> StudyConfig:
        return StudyConfig.make(read_kept(self.config_path))

    def admits(self, config: StudyConfig) -> StudyConfig:
        """The study's settings if it goes on with `config`; refused unless it is free, the same or a larger study.

        Writes nothing.
        """
        if self.is_free:
            return config
        if not self.config_path.exists():
            raise SPDError(f"{self.path} exists and is not a study; choose a new directory")
        earlier = self.config
        if differ := config.extended(earlier):
            raise SPDError(
                f"{self.path} holds a study with other settings ({'; '.join(differ)}); methods and seeds can be "
                "added to it, for anything else choose another --out"
            )
        return config.after(earlier)

    def begin(self, config: StudyConfig) -> None:
        """Write the settings, where they are new."""
        # a file that an earlier version wrote, without later settings, says the same
        if not self.config_path.exists() or self.config.to_yaml() != config.to_yaml():
            write_text(self.config_path, config.to_yaml())

    def base(self) -> Cell:
        """The base model's place."""
        return Cell(self.path / BASE, "", BASE, None)

    def cell(self, source: str, method: str, seed: int) -> Cell:
        """One method's place; `source` is the name that its results are kept under."""
        return Cell(self.path / source / method / str(seed), source, method, seed)

    def cells(self, config: StudyConfig | None = None) -> list[Cell]:
        """All places but the base model's, by source, method and seed."""
        config = config or self.config
        return [
            self.cell(source, method, seed)
            for source in named(config.sources)
            for method in config.trained
            for seed in config.seeds
        ]

    def measured(self) -> Mapping[str, Mapping[str, float]]:
        """For each stage, the measured `seconds`, and the estimated seconds of the same units (`work`)."""
        return self.notes.get("measured", {})

    def add_measured(self, stage: str, seconds: float, work: float) -> None:
        """Count a unit of work that was done from its beginning to its end."""
        known = self.measured().get(stage, {"seconds": 0.0, "work": 0.0})
        entry = {"seconds": round(known["seconds"] + seconds, 2), "work": known["work"] + work}
        self.note(measured={**self.measured(), stage: entry})
        self.record()
