"""Where a training happens on disk: a scratch directory with checkpoints, and a result that appears all at once."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import Field

from spd_lens.errors import UNREADABLE, DamagedFile, SPDError
from spd_lens.files import (
    Schema,
    damage,
    fitting,
    forget,
    inventory,
    is_free,
    make_directory,
    publish,
    read_json,
    sync,
    unreadable_weights,
    write_json,
)
from spd_lens.generation import disk_errors_explained, refuse_other_settings
from spd_lens.models import TRAINING_LOG as LOG
from spd_lens.models import adapter_damage, trained_files
from spd_lens.settings import LATER

log = logging.getLogger(__name__)

COMPLETE = "complete"
"""Written into a checkpoint once all else is on the disk: its `inventory`. Earlier versions' is empty."""
_STATE = "trainer_state.json"
_BESIDE_WEIGHTS = ("optimizer.pt", "scheduler.pt", "rng_state.pth", _STATE)
"""What a checkpoint of one process holds beside the weights."""
_OF_SEVERAL = ("rng_state_*.pth", "optimizer_*", "pytorch_model_*", "global_step*", "latest", "zero_to_fp32.py")
"""What one of several processes holds besides: each one's random state, and what FSDP and DeepSpeed keep."""


def _remove(place: Path) -> None:
    """Delete a directory with all that is in it, or the link or file that stands in its place."""
    if place.is_symlink() or not place.is_dir():
        place.unlink(missing_ok=True)
    else:
        shutil.rmtree(place, ignore_errors=True)


class _State(Schema, extra="ignore"):
    """What is read of transformers' `trainer_state.json`."""

    global_step: int = Field(ge=0, lt=2**31)
    log_history: list[dict[str, Any]]


class TrainingPlace:
    """`out` exists once the training is finished and not before; until then all is in `out.training` beside it."""

    def __init__(self, directory: Path) -> None:
        """Raises `SPDError` if something else is there."""
        self.directory = directory
        self.scratch = directory.with_name(f"{directory.name}.training")
        self.checkpoints = self.scratch / "checkpoints"
        self.epochs = self.scratch / "epochs"
        """The weights at the end of the last two epochs, where the result may be those of an earlier one."""
        self.result = self.scratch / "result"
        """Filled, then renamed to `directory`."""
        if not is_free(directory) and not (directory / LOG).is_file():
            raise SPDError(f"{directory} exists and does not come from finetune; give another directory as out")

    def finished(self, settings: dict[str, Any]) -> bool:
        """Whether the result is there already, and whole; `SPDError` if it was trained with other settings."""
        noted = self.directory / LOG
        if not noted.is_file():
            return False
        try:
            earlier = dict(read_json(noted)["settings"])
        except (SPDError, *UNREADABLE) as error:
            raise SPDError(f"{noted} cannot be read ({error}); remove its directory and train again") from error
        _refuse_other_settings(f"the adapter in {self.directory} was trained", earlier, settings)
        return is_finished(self.directory)

    @contextlib.contextmanager
    def working(self, settings: dict[str, Any], resume: bool) -> Iterator[None]:
        """Hold the scratch directory, alone, with what an interrupted training with these settings left there."""
        for place in (self.directory, self.scratch, self.checkpoints, self.epochs, self.result):
            if place.is_symlink():  # what is in them will be deleted
                raise SPDError(f"{place} is a link, and its content would be replaced; give another directory as out")
        failed = f"the training directory {self.scratch} cannot be written"
        with disk_errors_explained(failed):
            make_directory(self.scratch)
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
        earlier = _settings(noted) if resume else None
        if earlier is not None:
            _refuse_other_settings(f"the training in {self.scratch} was begun", earlier, settings)
        else:
            for left in (self.checkpoints, self.epochs):
                if left.exists():
                    shutil.rmtree(left)
        shutil.rmtree(self.result, ignore_errors=True)
        self.checkpoints.mkdir(exist_ok=True)
        write_json(noted, settings)

    def latest_checkpoint(self, best_epoch: Callable[[str], int] | None = None) -> str | None:
        """The newest checkpoint that is whole; others, which a killed process or a power failure left, are deleted.

        `best_epoch`: the epoch, counted from 1, whose weights a checkpoint says are the best so far, or 0 for none.
        Given where they are kept: they must be whole then, too.
        """
        found = [place for place in self.checkpoints.glob("checkpoint-*") if re.fullmatch("[0-9]+", place.name[11:])]
        for checkpoint in sorted(found, key=lambda place: int(place.name[11:]), reverse=True):
            problem = _checkpoint_damage(checkpoint)
            if problem is None and best_epoch is not None:
                try:
                    if epoch := best_epoch(str(checkpoint)):
                        problem = _checkpoint_damage(self.epochs / str(epoch))
                except UNREADABLE:  # a loss that is no number, or of a step that was none
                    problem = f"{checkpoint} has the log of no training"
            if problem is None:
                return str(checkpoint)
            log.info("%s: going on from before it", problem)
            _remove(checkpoint)
        return None

    def keep_epoch(self, epoch: int, checkpoint: Path) -> None:
        """Keep the weights of the checkpoint at an epoch's end (counted from 1), before the checkpoint is marked.

        Those of two epochs ago go: were they the best, the training would have stopped by now.
        """
        kept = self.epochs / str(epoch)
        _remove(kept)  # of a process that was killed here, or of a checkpoint that was lost
        shutil.copytree(checkpoint, kept, ignore=shutil.ignore_patterns(*_BESIDE_WEIGHTS, *_OF_SEVERAL, COMPLETE))
        complete_checkpoint(kept)
        _remove(self.epochs / str(epoch - 2))

    def take_epoch(self, epoch: int) -> None:
        """Make the weights of an epoch the result."""
        shutil.copytree(self.epochs / str(epoch), self.result, ignore=shutil.ignore_patterns(COMPLETE))

    def publish(self, summary: dict[str, Any]) -> None:
        """Give the finished result its name, in one step, and delete the checkpoints."""
        write_json(self.result / LOG, {**summary, **trained_files(self.result)})
        forget(self.directory)
        if self.directory.exists():  # free, damaged, or what `resume=False` trains anew
            _remove(self.directory)
        publish(self.result, self.directory)
        shutil.rmtree(self.scratch, ignore_errors=True)


def complete_checkpoint(checkpoint: Path) -> None:
    """Mark a checkpoint as finished, with every file of it on the disk."""
    sync(checkpoint)
    write_json(checkpoint / COMPLETE, inventory(checkpoint))


def is_finished(directory: Path) -> bool:
    """Whether an adapter or checkpoint is there with the weights that were trained; damage is logged.

    What a process that was killed at the very end has left beside it goes.
    """
    if not directory.exists():
        return False
    if problem := _result_damage(directory):
        log.warning("%s: training it again", problem)
        return False
    scratch = directory.with_name(f"{directory.name}.training")
    if scratch.is_dir() and not scratch.is_symlink():
        with contextlib.suppress(Timeout, OSError), FileLock(scratch / "lock", timeout=0):
            shutil.rmtree(scratch, ignore_errors=True)
    return True


def _result_damage(directory: Path) -> str | None:
    """What is wrong with weights or, which may have been edited since, with the configuration: can it be read?"""
    try:
        _check_config(directory)
        # earlier versions noted no digests
        return adapter_damage(directory) or unreadable_weights(directory)
    except (SPDError, *UNREADABLE) as error:
        return f"the adapter in {directory} is damaged ({error})"


def _checkpoint_damage(checkpoint: Path) -> str | None:
    marker = checkpoint / COMPLETE
    if not marker.is_file():
        return f"{checkpoint} was not finished"
    try:
        if not marker.stat().st_size:
            return _earlier_damage(checkpoint)
        if (state := checkpoint / _STATE).exists():
            fitting(_State, read_json(state), state)
        return damage(checkpoint, read_json(marker))
    except Exception as error:  # damaged archives raise many types
        return f"{checkpoint} is damaged ({error})"


def _earlier_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint of an earlier version, which noted no digests; torch's files have their own."""
    for name in _BESIDE_WEIGHTS:
        if name.endswith(".json"):
            read_json(checkpoint / name)
            continue
        with zipfile.ZipFile(checkpoint / name) as archive:
            if archive.testzip() is not None:
                return f"{checkpoint / name} is damaged"
    _check_config(checkpoint)
    return unreadable_weights(checkpoint)


def _check_config(directory: Path) -> None:
    """Read the configuration of an adapter or checkpoint; an error if it is damaged."""
    config = directory / "adapter_config.json"
    read_json(config if config.exists() else directory / "config.json")


def _settings(noted: Path) -> dict[str, Any] | None:
    """What a training was begun with; None if nothing says, so that its checkpoints are of no use."""
    if not noted.exists():
        return None
    try:
        record = read_json(noted)
    except DamagedFile as error:
        log.warning("%s: training from the first step on", error)
        return None
    return record if isinstance(record, dict) and record else None


def _refuse_other_settings(what: str, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Settings that are not recorded are at their defaults."""
    refuse_other_settings(what, {**LATER, **earlier}, {**LATER, **now})
