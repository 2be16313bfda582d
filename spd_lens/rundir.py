"""`Run`: a directory that holds everything a run made, stage by stage."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from spd_lens.config import SPDConfig
from spd_lens.corpus import Corpus
from spd_lens.errors import SPDError
from spd_lens.evaluation import EvalResult, ForcedItem
from spd_lens.moments import GradientMoments
from spd_lens.storage import read_json, write_json
from spd_lens.subspace import Subspace

_PACKAGES = ("spd-lens", "torch", "transformers", "transformer-lens", "peft", "numpy", "scipy")


class Run:
    """What a run directory holds. Artefacts are read when asked for; an unfinished stage raises `SPDError`.

    | file | what |
    | --- | --- |
    | `config.yaml` | all settings |
    | `run.json` | versions, machine, fingerprints, resolved sampling, what each stage proved, seconds per stage |
    | `moments.safetensors`, `subspace.safetensors` | extraction |
    | `corpus.jsonl`, `unprojected.jsonl` | completions with the projection, and some without it |
    | `adapter/` | PEFT adapter (or a whole checkpoint) |
    | `effects/TASK.json` | teacher-forced effects per item |
    | `eval/TASK/POLICY.json` | every test item's prompt, completion, answer and verdict |
    | `summary.md` | the result, readable |
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @classmethod
    def open(cls, path: str | Path, config: SPDConfig | None = None) -> Run:
        """An existing run, or with `config` a new or resumed one.

        Raises `SPDError` if the directory belongs to a run with other settings, or to something else.
        """
        run = cls(path)
        if run.config_path.exists():
            if config is not None and (differ := run.config.differences(config)):
                named = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in differ.items())
                raise SPDError(f"{path} holds a run with other settings ({named}); choose another --out or the same")
            return run
        if config is None:
            raise SPDError(f"{path} is not a run directory: it has no config.yaml")
        if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            raise SPDError(f"{path} exists and is not a run directory; choose a new directory")
        run.path.mkdir(parents=True, exist_ok=True)
        run.config_path.write_text(config.to_yaml(), encoding="utf-8")
        return run

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out of the directory."""
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise SPDError(f"another process is working on {self.path}; wait for it or choose another --out") from error
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds of a stage, over interruptions."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.notes.get("seconds", {})
            seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 1)
            self.note(seconds=seconds)

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def config(self) -> SPDConfig:
        return SPDConfig.read(self.config_path)

    @property
    def notes(self) -> dict[str, Any]:
        """`run.json`."""
        path = self.path / "run.json"
        return read_json(path) if path.exists() else {}

    def note(self, **fields: Any) -> None:
        """Add to `run.json`."""
        write_json(self.path / "run.json", {**self.notes, **fields})

    def note_once(self, what: str, **fields: Any) -> None:
        """Add to `run.json`, or refuse to go on where an earlier part of the run saw something else."""
        notes = self.notes
        for key, value in fields.items():
            if key in notes and notes[key] != value:
                raise SPDError(
                    f"{what} is not what {self.path} was begun with ({key} differs); start a new run directory"
                )
        self.note(**fields)

    @property
    def moments(self) -> GradientMoments:
        return GradientMoments.load(self.path / "moments.safetensors")

    @property
    def subspace(self) -> Subspace:
        return Subspace.load(self.path / "subspace.safetensors")

    @property
    def corpus(self) -> Corpus:
        return Corpus.load(self.path / "corpus.jsonl")

    @property
    def unprojected(self) -> Corpus:
        """Completions of some of the same prompts with the same noise, without the projection."""
        return Corpus.load(self.path / "unprojected.jsonl")

    @property
    def adapter(self) -> Path:
        path = self.path / "adapter"
        if not path.exists():
            raise SPDError(f"{self.path} has no adapter yet; let the run finish its fine-tuning")
        return path

    def result(self, task: str, policy: str) -> EvalResult:
        """Scores of one policy (`base`, `projected`, `spd`) on one task."""
        return EvalResult.load(self.path / "eval" / task / f"{policy}.json")

    def effects(self, task: str) -> dict[str, list[ForcedItem]]:
        """Teacher-forced effects on one task: `base`, `projected`, `spd`, `random-0`, ..."""
        record = read_json(self.path / "effects" / f"{task}.json")
        return {policy: [ForcedItem(**item) for item in items] for policy, items in record.items()}

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
