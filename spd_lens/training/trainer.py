"""What `finetune` gives to `transformers.Trainer`: batches in passes, checkpoints and the loss log."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from spd_lens.errors import SPDError
from spd_lens.files import read_json, write_text
from spd_lens.models import angles_change_beyond, fastest_attention, sync_trained_alone
from spd_lens.output import progress_bar
from spd_lens.training.checkpoint_dir import complete_checkpoint
from spd_lens.training.length_groups import passes
from spd_lens.training.loss import NextTokenLoss
from spd_lens.training.parallel import Processes
from spd_lens.training.rows import Row, collated


class PlacedArguments(TrainingArguments):
    """Trainer's arguments for a model that stays where it is: of themselves they name `cuda:0`, or a CPU where
    accelerate does not know the accelerator, and Trainer moves the model there."""

    @property
    def device(self) -> torch.device:
        """Where Trainer and accelerate put model and batches."""
        super().device  # noqa: B018  # sets accelerate up
        place: torch.device = self.distributed_state.device
        return place

    def place(self, device: torch.device) -> None:
        """Train on this device."""
        self.distributed_state.device = device


class CorpusTrainer(Trainer):
    """`Trainer` that runs batches in passes of similar length, writes safetensors alone, shows one bar or nothing.

    Of several processes, each reads whole batches and runs its share of every pass, so that a step is that of one
    process but for the order in which numbers are added.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        rows: Sequence[Row],
        pad_id: int,
        progress: bool,
        callbacks: Sequence[TrainerCallback] = (),
        processes: Processes = Processes(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=rows, data_collator=partial(collated, pad_id=pad_id))
        for callback in (PrinterCallback, ProgressCallback):  # they print every loss
            self.remove_callback(callback)
        for callback in callbacks:  # before a checkpoint is marked as finished
            self.add_callback(callback)
        self.add_callback(_Guard())
        self.add_callback(_Bar(progress))
        self.model_accepts_loss_kwargs = True  # that is: count the scored tokens of a step, and do not scale again
        self._inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._next_token_loss = NextTokenLoss(self._inner, processes.sharded)
        self._padding_is_scored = "attention_mask" in rows[0]
        self._processes = processes
        if processes.sharded and self.accelerator.distributed_type not in (
            DistributedType.FSDP,
            DistributedType.DEEPSPEED,
        ):
            raise SPDError(
                f"the launcher's configuration asks for {processes.engine}, which accelerate does on GPUs alone; the "
                f"model is on {self.args.device}; launch with docs/accelerate/ddp-cpu.yaml, or load the model on GPUs"
            )
        if processes.engine == "ddp":
            sync_trained_alone(model)

    def get_train_dataloader(self) -> Any:
        """Whole batches in every process, in the order of a single one."""
        if self._processes.engine is None:
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size * self._processes.count,
            sampler=self._get_train_sampler(),
            collate_fn=self.data_collator,
        )
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True, use_seedable_sampler=True,
            data_seed=self.args.data_seed,
        )  # fmt: skip

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward pass, one group of texts after the other: a graph is gone before the next begins."""
        losses = []
        parts = passes(inputs, angles_change_beyond(self._inner.config), self._processes.count)
        for part, together in self._with_sync(model, self._processes.shares(parts)):
            with together, fastest_attention(self._inner, part["input_ids"].shape[1]):
                losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    def _with_sync(
        self, model: nn.Module, parts: Sequence[dict[str, Tensor]]
    ) -> Iterator[tuple[dict[str, Tensor], Any]]:
        """Passes, and a context for each: gradients of several processes meet once, with the last pass of a step.

        Where weights are sharded they meet after every pass, since a process keeps its own part of them alone.
        """
        state = self.accelerator.gradient_state
        ends_step = state.sync_gradients
        for part in parts[:-1]:
            state._set_sync_gradients(False)
            yield part, contextlib.nullcontext() if self._processes.sharded else self.accelerator.no_sync(model)
        state._set_sync_gradients(ends_step)
        yield parts[-1], contextlib.nullcontext()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """What a pass adds to the step's mean over all of its scored tokens."""
        assert num_items_in_batch is not None
        mask = inputs["attention_mask"] if self._padding_is_scored else None
        loss = self._next_token_loss(model, inputs["input_ids"], inputs["labels"], mask) / num_items_in_batch
        return loss * self._processes.count  # of whose gradients the mean is taken

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            save_weights(self.model, Path(output_dir or self.args.output_dir), state_dict)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()  # each process writes a file of its own into it

    @property
    def loss_log(self) -> list[dict[str, Any]]:
        """Step, epoch, loss (nats per token), learning rate and gradient norm, per logged step."""
        wanted = ("step", "epoch", "loss", "learning_rate", "grad_norm")
        entries = [entry for entry in self.state.log_history if "loss" in entry]
        return [{name: entry[name] for name in wanted if name in entry} for entry in entries]


class _Guard(TrainerCallback):
    """Marks finished checkpoints, and stops a training that has diverged."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            complete_checkpoint(Path(args.output_dir or "") / f"checkpoint-{state.global_step}")

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        # a gradient can overflow where the loss does not, and after the last step no loss would show it
        for name, what in (("loss", "loss"), ("grad_norm", "norm of the gradients")):
            value = float((logs or {}).get(name, 0.0))
            if not math.isfinite(value):
                raise SPDError(
                    f"the training {what} became {value} at step {state.global_step}; lower lr, or load the model with "
                    "dtype='float32'"
                )


class _Bar(TrainerCallback):
    """A progress bar with the latest loss."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self._bar = progress_bar(self._shown, total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self._bar is not None and "loss" in (logs or {}):
            self._bar.set_postfix(loss=f"{logs['loss']:.4f}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self._bar.close()


def save_weights(model: nn.Module, directory: Path, state: dict[str, Tensor] | None = None) -> None:
    """A standard PEFT adapter, or a standard checkpoint, in safetensors. `state`: where the model's own is sharded."""
    inner: Any = model
    if isinstance(model, PeftModel):
        # "auto" would ask the hub whether the base model's vocabulary has grown
        inner.save_pretrained(str(directory), save_embedding_layers=False, state_dict=state)
        (directory / "README.md").unlink(missing_ok=True)  # a model card with nothing filled in
        _in_order(directory / "adapter_config.json", inner.peft_config["default"])
    else:
        inner.save_pretrained(str(directory), state_dict=state)


def _in_order(path: Path, config: Any) -> None:
    """PEFT writes its sets in the order of their hashes, which is another in each process."""
    record = read_json(path)
    record |= {name: sorted(record[name]) for name, value in vars(config).items() if isinstance(value, set)}
    write_text(path, json.dumps(record, indent=2, sort_keys=True))
