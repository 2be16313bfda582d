"""Where a training happens on disk: a scratch directory with checkpoints, and a result that appears all at once."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers.trainer_utils import get_last_checkpoint

from spd_lens.corpus import Corpus, disk_errors_explained, refuse_other_settings
from spd_lens.errors import SPDError
from spd_lens.storage import write_json
from spd_lens.training.trainer import COMPLETE

LOG = "training.json"


def default_place(corpus: Corpus) -> Path:
    """`adapter` beside the corpus file, or a new temporary directory."""
    if corpus.path is not None:
        return corpus.path.parent / "adapter"
    return Path(tempfile.mkdtemp(prefix="spd_")) / "adapter"


class TrainingPlace:
    """`out` exists once the training is finished and not before; until then all is in `out.training` beside it."""

    def __init__(self, directory: Path) -> None:
        """Raises `SPDError` if something else is there."""
        self.directory = directory
        self.scratch = directory.with_name(f"{directory.name}.training")
        self.checkpoints = self.scratch / "checkpoints"
        self.result = self.scratch / "result"
        """Filled, then renamed to `directory`."""
        empty = not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))
        if not empty and not (directory / LOG).is_file():
            raise SPDError(f"{directory} exists and does not come from finetune; give another directory as out")

    def finished(self, settings: dict[str, Any]) -> bool:
        """Whether the result is there already; `SPDError` if it was trained with other settings."""
        if not (self.directory / LOG).is_file():
            return False
        refuse_other_settings(
            f"the adapter in {self.directory} was trained", _read(self.directory / LOG)["settings"], settings
        )
        return True

    @contextlib.contextmanager
    def working(self, settings: dict[str, Any], resume: bool) -> Iterator[None]:
        """Hold the scratch directory, alone, with what an interrupted training with these settings left there."""
        failed = f"the training directory {self.scratch} cannot be written"
        with disk_errors_explained(failed):
            self.scratch.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.scratch / "lock")
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise SPDError(f"another process is training in {self.scratch}; wait for it") from error
        try:
            with disk_errors_explained(failed):
                self._take_up(settings, resume)
            yield
        finally:
            lock.release()

    def _take_up(self, settings: dict[str, Any], resume: bool) -> None:
        noted = self.scratch / "settings.json"
        if noted.exists() and resume:
            refuse_other_settings(f"the training in {self.scratch} was begun", _read(noted), settings)
        elif self.checkpoints.exists():
            shutil.rmtree(self.checkpoints)
        shutil.rmtree(self.result, ignore_errors=True)
        self.checkpoints.mkdir(exist_ok=True)
        write_json(noted, settings)

    def latest_checkpoint(self) -> str | None:
        """The newest finished checkpoint; unfinished ones, which a killed process left behind, are deleted."""
        for directory in self.checkpoints.glob("checkpoint-*"):
            if not (directory / COMPLETE).exists():
                shutil.rmtree(directory)
        return get_last_checkpoint(str(self.checkpoints))

    def publish(self, summary: dict[str, Any]) -> None:
        """Give the finished result its name, in one step, and delete the checkpoints."""
        write_json(self.result / LOG, summary)
        if self.directory.exists():  # an empty directory, or what `resume=False` trains anew
            shutil.rmtree(self.directory)
        self.result.rename(self.directory)
        shutil.rmtree(self.scratch, ignore_errors=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SPDError(f"{path} cannot be read ({error}); remove its directory and train again") from error
