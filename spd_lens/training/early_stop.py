"""Stopping after an epoch without a lower training loss, with the weights of the best epoch as the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from spd_lens.training.checkpoint_dir import TrainingPlace


class EarlyStop(TrainerCallback):
    """Makes a checkpoint at the end of every epoch, keeps the weights beside it, and stops when a loss is not lower.

    All that it goes by is the log, which every checkpoint holds, so that a training which is continued stops where an
    undisturbed one does.
    """

    def __init__(self, place: TrainingPlace, steps_per_epoch: int) -> None:
        self._place = place
        self._steps_per_epoch = steps_per_epoch

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._steps_per_epoch == 0:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        epoch, rest = divmod(state.global_step, self._steps_per_epoch)
        if not rest:
            if state.is_world_process_zero:
                self._place.keep_epoch(epoch, Path(args.output_dir or "") / f"checkpoint-{state.global_step}")
            control.should_training_stop |= is_over(self.losses(state))

    def losses(self, state: Any) -> list[float]:
        """The mean of the step losses of each finished epoch, in nats per token."""
        logged = {entry["step"]: entry["loss"] for entry in state.log_history if "loss" in entry}
        n = self._steps_per_epoch
        return [
            fmean(logged[step] for step in range(start + 1, start + n + 1))
            for start in range(0, state.global_step - n + 1, n)
        ]

    def best_epoch(self, checkpoint: str) -> int:
        """The best epoch that a checkpoint knows of, counted from 1; 0 for none."""
        return best_epoch(self.losses(_state(checkpoint)))

    def ended(self, checkpoint: str) -> TrainerState | None:
        """The state of a training that stopped at this checkpoint; None if there is more to do."""
        state = _state(checkpoint)
        return state if is_over(self.losses(state)) else None

    def report(self, state: Any, n_epochs: int) -> dict[str, Any]:
        """For `training.json`: which epoch's weights were taken, each epoch's loss, and whether it ended before the
        last epoch."""
        losses = self.losses(state)
        return {"epoch": best_epoch(losses), "losses": losses, "stopped_early": len(losses) < n_epochs}


def best_epoch(losses: Sequence[float]) -> int:
    """The epoch of the lowest loss, counted from 1; of equal ones the first. 0 where there is none."""
    return 1 + losses.index(min(losses)) if losses else 0


def is_over(losses: Sequence[float]) -> bool:
    """Whether the last of these epochs is not better than all before it."""
    return best_epoch(losses) < len(losses)


def _state(checkpoint: str) -> TrainerState:
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
