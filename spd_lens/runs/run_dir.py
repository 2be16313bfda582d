"""`Run`: a directory that holds everything a run made, stage by stage."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Self

import torch
from filelock import FileLock, Timeout
from pydantic import model_validator

from spd_lens.errors import DamagedFile, Guardrail, SPDError, caution, is_strict
from spd_lens.evaluation import EvalResult
from spd_lens.files import (
    MANIFEST,
    Schema,
    fitting,
    is_blank,
    is_free,
    make_directory,
    read_json,
    record_files,
    refuse_linked,
    write_json,
    write_text,
)  # fmt: skip
from spd_lens.generation import Corpus
from spd_lens.models import ModelPair
from spd_lens.runs.artefacts import Artefacts
from spd_lens.runs.config import BESIDE, SPDConfig, read_kept
from spd_lens.subspaces import GradientMoments

_LOCK = ".lock"
_PACKAGES = ("spd-lens", "torch", "transformers", "transformer-lens", "peft", "numpy", "scipy")


class _Environment(Schema):
    versions: dict[str, str]
    machine: dict[str, Any]


class _Parity(Schema):
    logits: float
    kl: float


class _Hooks(Schema):
    firings: dict[str, int]
    fold_parity: _Parity


class _Measured(Schema):
    seconds: float
    work: float


class Notes(Schema, extra="allow"):
    """What may stand in `run.json`, `study.json` and `rounds.json`, as far as it is read back by name."""

    versions: dict[str, str] | None = None
    machine: dict[str, Any] | None = None
    continued_with: list[_Environment] = []
    fingerprint: dict[str, Any] | None = None
    weights: str | None = None
    resolved: dict[str, Any] = {}
    left_out: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    foreseen: dict[str, float] = {}
    hooks: _Hooks | None = None
    measured: dict[str, _Measured] = {}
    settings: dict[str, Any] = {}
    prompt_date: str | None = None
    published_name: str | None = None
    stopped: str | None = None
    cautions: list[str] = []

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.versions is None) != (self.machine is None):
            raise ValueError("versions and machine belong together")
        return self


_STAGES = {
    "config.yaml": "settings", "study.yaml": "settings", "data_card": "settings", "moments": "extract",
    "subspace": "extract", "projection": "extract", "corpus": "generate", "unprojected": "compare",
    "adapter": "finetune", "effects": "effects", "side_effects": "effects", "eval": "evaluate",
    **dict.fromkeys(("findings.json", "summary.md", "done.json", "results.csv", "corpora.csv"), "report"),
    **dict.fromkeys(("comparisons.csv", "report.", "rounds.csv"), "report"),
}  # fmt: skip
"""Which stage writes the files and folders whose names begin so. All others are somebody else's."""


def stage_of(path: PurePath) -> str | None:
    """The stage of a run or a study that writes a file, by its path below the folder; None if none does."""
    if path.name in ("adapter_config.json", "README.md"):  # which their owner may edit
        return None
    return next((stage for part in path.parts for name, stage in _STAGES.items() if part.startswith(name)), None)


class Folder:
    """A directory that one process at a time works in, with notes on how its content was made."""

    kind = "run directory"
    """How error messages name it."""
    settings_file = "config.yaml"
    """Written first: what makes the directory one of this kind."""
    notes_file = "run.json"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """One that has been begun, or `SPDError`."""
        folder = cls(path)
        if not folder.config_path.exists():
            raise SPDError(f"{path} is not a {cls.kind}: it has no {cls.settings_file}")
        read_kept(folder.config_path)
        return folder

    @property
    def config_path(self) -> Path:
        return self.path / self.settings_file

    @property
    def is_free(self) -> bool:
        """Whether a new one may begin here, also where a process was killed before it had begun one."""
        return is_free(self.path, self.settings_file, self.notes_file)

    @property
    def notes(self) -> dict[str, Any]:
        """What the folder says about how it was made."""
        path = self.path / self.notes_file
        if not path.exists() or is_blank(path):
            return {}
        notes = read_json(path)
        if type(notes) is not dict:
            raise DamagedFile(f"{path} holds no notes of a {type(self).__name__.lower()}; start a new directory")
        fitting(Notes, notes, path)
        return notes

    def note(self, **fields: Any) -> None:
        """Add to the notes."""
        write_json(self.path / self.notes_file, {**self.notes, **fields})

    def dated(self, pair: ModelPair) -> ModelPair:
        """The pair, asked as on the day on which the folder was begun, where its prompts show a date."""
        return pair.dated(self.notes.get("prompt_date"))

    def note_date(self, pair: ModelPair) -> None:
        """Add the date that prompts show, or refuse to go on with another one."""
        if pair.format.prompt_date is not None:
            self.note_once("the date in the prompts", prompt_date=pair.format.prompt_date)

    def note_environment(self, now: Mapping[str, Any] | None = None) -> None:
        """Versions and machine: those a run was begun with, and those of later starts where they differ.

        Args:
            now: What `environment` gives in the process that works; None: this one.
        """
        now, notes = now or environment(), self.notes
        if "versions" not in notes:
            self.note(**now)
        elif now not in (known := [{key: notes[key] for key in now}, *notes.get("continued_with", [])]):
            self.note(continued_with=[*known[1:], now])

    def note_once(self, what: str, **fields: Any) -> None:
        """Add to the notes, or refuse to go on where an earlier part of the run saw something else."""
        notes = self.notes
        for key, value in fields.items():
            if key in notes and notes[key] != value:
                raise SPDError(f"{what} is not what {self.path} was begun with ({key} differs); start a new directory")
        self.note(**fields)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out of the directory."""
        lock = FileLock(self.path / _LOCK)
        try:
            make_directory(self.path)
            refuse_linked(self.path)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise SPDError(f"another process is working on {self.path}; wait for it or choose another --out") from error
        except OSError as error:
            raise SPDError(f"{self.path} cannot be written ({error}); choose another --out") from error
        try:
            if self.is_free:
                for name in (self.settings_file, self.notes_file):
                    (self.path / name).unlink(missing_ok=True)  # empty, if they are there
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def guarded(self, strict: bool) -> Iterator[None]:
        """While open, what guardrails say is noted, and with `strict` it is an error. What they said earlier is said
        again at once: whoever goes on with the folder is to know it."""
        with warnings.catch_warnings():
            warnings.simplefilter("error" if strict or is_strict() else "always", Guardrail)
            shown = warnings.showwarning

            def note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
                if issubclass(category, Guardrail):
                    self._note_caution(message)
                shown(message, category, *where, **more)

            warnings.showwarning = note
            try:
                for sentence in self.notes.get("cautions", []):
                    caution(sentence)
                yield
            except Guardrail as fault:
                self._note_caution(fault)
                raise

    def _note_caution(self, sentence: Warning | str) -> None:
        noted = self.notes.get("cautions", [])
        if str(sentence) not in noted:
            self.note(cautions=[*noted, str(sentence)])

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """`locked`; what was finished meanwhile is then listed in `manifest.json`."""
        with self.locked():
            try:
                yield
            finally:
                self.record()

    def record(self) -> None:
        """List all that is finished here in `manifest.json`; what could not be written is what to say, if anything."""
        if not self.config_path.exists():  # a folder that is locked alone, and is none of ours
            return
        with contextlib.suppress(SPDError, OSError):
            record_files(self.path, self._finished(self.path), stage_of)

    def _finished(self, folder: Path) -> Iterator[Path]:
        """Files that are whole, as far as one can tell: notes change with every start, and pages of analyses are
        recorded by those who write them, as is what is in a folder with a manifest of its own."""
        for place in sorted(folder.iterdir()):
            if (
                place.name.startswith(".")
                or place.suffix in (".lock", ".training", ".tensorboard")
                or place.is_symlink()
            ):
                continue
            if place.is_dir():
                if place.name != "analysis" and not (place / MANIFEST).exists():
                    yield from self._finished(place)
            elif place.is_file() and place not in (self.path / self.notes_file, self.path / MANIFEST):
                yield place

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds of a stage, over interruptions (what a killed process spent is lost)."""
        start = time.perf_counter()

        def count() -> None:
            seconds = self.notes.get("seconds", {})
            seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 1)
            self.note(seconds=seconds)

        try:
            yield
        except BaseException:
            with contextlib.suppress(SPDError):  # on a disk that is full: what stopped the stage is what to say
                count()
            raise
        count()
        self.record()


class Run(Folder, Artefacts):
    """What a run directory holds. Artefacts are read when asked for; an unfinished stage raises `SPDError`.

    | file | what |
    | --- | --- |
    | `config.yaml` | all settings |
    | `manifest.json` | size, sha256 and stage of every finished file |
    | `run.json` | versions, machine, fingerprints, resolved sampling, texts left out, doubts, proofs and seconds |
    | `data_card.json` | for each task: counts, duplicates removed, span statistics, sha256 of the sources |
    | `moments.safetensors`, `subspace.safetensors` | extraction |
    | `corpus.jsonl`, `unprojected.jsonl` | completions with the projection, and some without it |
    | `adapter/` | PEFT adapter (or a whole checkpoint) |
    | `effects/TASK.json` | teacher-forced outcomes per item |
    | `side_effects/neutral.json` | the same on other texts |
    | `eval/TASK/POLICY.json` | every test item's prompt, completion, answer and verdict |
    | `findings.json` | what these say of subspace and adapter: their grade follows from it |
    | `summary.md` | the result, readable |
    """

    @classmethod
    def open(cls, path: str | Path, config: SPDConfig | None = None) -> Run:
        """An existing run, or with `config` a new or resumed one.

        Raises `SPDError` if the directory belongs to a run with other settings, or to something else.
        """
        if config is None:
            return super().open(path)
        run = cls(path)
        run.check(config)
        if run.is_free:
            with run.locked():
                run.check(config)  # another process may have begun a run meanwhile
                write_text(run.config_path, config.to_yaml())
        else:
            earlier = run.config
            now = earlier.model_copy(update={name: getattr(config, name) for name in BESIDE})
            if now != earlier:
                with run.locked():
                    write_text(run.config_path, now.to_yaml())
        return run

    def check(self, config: SPDConfig) -> None:
        """Raise `SPDError` unless the directory is a run with these settings or free for a new one. Writes nothing."""
        if self.is_free:
            return
        if not self.config_path.exists():
            raise SPDError(f"{self.path} exists and is not a run directory; choose a new directory")
        if differ := self.config.differences(config):
            named = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in differ.items())
            raise SPDError(
                f"{self.path} holds a run with other settings ({named}); choose another --out or the same settings"
            )

    @property
    def config(self) -> SPDConfig:
        return SPDConfig.make(read_kept(self.config_path))

    @property
    def moments(self) -> GradientMoments:
        return GradientMoments.load(self.moments_path)

    @property
    def moments_path(self) -> Path:
        return self.path / "moments.safetensors"

    @property
    def unprojected(self) -> Corpus:
        """Completions of some of the same prompts with the same noise, without the projection."""
        return Corpus.load(self.unprojected_path)

    @property
    def unprojected_path(self) -> Path:
        return self.path / "unprojected.jsonl"

    @property
    def adapter(self) -> Path:
        if not (path := super().adapter).exists():
            raise SPDError(f"{self.path} has no adapter yet; let the run finish its fine-tuning")
        return path

    def result(self, task: str, policy: str) -> EvalResult:
        """Scores of one policy (`base`, `projected`, `spd`) on one task, by its name in `config.targets`."""
        return EvalResult.load(self.result_path(task, policy))

    @property
    def summary(self) -> str:
        """`summary.md`."""
        path = self.path / "summary.md"
        if not path.exists():
            raise SPDError(f"{self.path} has no summary yet; start the run again to finish it")
        return path.read_text(encoding="utf-8")


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    machine: dict[str, Any] = {"platform": platform.platform(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return {"versions": {"python": platform.python_version(), **versions}, "machine": machine}
