"""What `finetune` gives to `transformers.Trainer`: token rows, the collator, checkpoints and the loss log."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from spd_lens.errors import SPDError
from spd_lens.files import read_json, write_text
from spd_lens.generation import Record
from spd_lens.models import angles_change_beyond, fastest_attention
from spd_lens.training.checkpoint_dir import complete_checkpoint
from spd_lens.training.length_groups import passes
from spd_lens.training.loss import IGNORED, NextTokenLoss


class TokenRows(Dataset[dict[str, list[int]]]):
    """The corpus' own token ids, never tokenised again: EOS is there only where the model ended by itself."""

    def __init__(self, records: Sequence[Record], loss_on: str) -> None:
        """`loss_on`: `"all"` scores prompt and completion (Eq. 14), `"completion"` the completion alone."""
        self._rows = []
        for record in records:
            ids = [*record.prompt_ids, *record.completion_ids]
            # nothing predicts the first token: the sum of Eq. 14 starts at t = 2
            start = max(1, len(record.prompt_ids)) if loss_on == "completion" else 1
            self._rows.append({"input_ids": ids, "labels": [IGNORED] * start + ids[start:]})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self._rows[index]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row["input_ids"]) for row in self._rows)

    @property
    def n_scored(self) -> int:
        """Tokens with a loss, over all rows."""
        return sum(label != IGNORED for row in self._rows for label in row["labels"])


class Collator:
    """Rows of unequal length to one batch, padded on the right; padding is masked and has no loss."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Int[Tensor, "row pos"]]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> Tensor:
            return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

        mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        return {
            "input_ids": padded("input_ids", self.pad_id),
            "attention_mask": torch.tensor(mask),
            "labels": padded("labels", IGNORED),
        }


class CorpusTrainer(Trainer):
    """`Trainer` that runs batches in passes of similar length, writes safetensors alone, shows one bar or nothing."""

    def __init__(self, model: nn.Module, args: TrainingArguments, rows: TokenRows, pad_id: int, progress: bool) -> None:
        super().__init__(model=model, args=args, train_dataset=rows, data_collator=Collator(pad_id))
        for callback in (PrinterCallback, ProgressCallback):  # they print every loss
            self.remove_callback(callback)
        self.add_callback(_Guard())
        self.add_callback(_Bar(progress))
        self.model_accepts_loss_kwargs = True  # that is: count the scored tokens of a step, and do not scale again
        self._inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._next_token_loss = NextTokenLoss(self._inner)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward pass, one group of texts after the other: a graph is gone before the next begins."""
        losses = []
        for part in passes(inputs, angles_change_beyond(self._inner.config)):
            with fastest_attention(self._inner, part["input_ids"].shape[1]):
                losses.append(super().training_step(model, part, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """What a pass adds to the step's mean over all of its scored tokens."""
        assert num_items_in_batch is not None
        return self._next_token_loss(model, inputs["input_ids"], inputs["labels"]) / num_items_in_batch

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        save_weights(self.model, Path(output_dir or self.args.output_dir))

    @property
    def loss_log(self) -> list[dict[str, Any]]:
        """Step, epoch, loss (nats per token), learning rate and gradient norm, per logged step."""
        wanted = ("step", "epoch", "loss", "learning_rate", "grad_norm")
        entries = [entry for entry in self.state.log_history if "loss" in entry]
        return [{name: entry[name] for name in wanted if name in entry} for entry in entries]


class _Guard(TrainerCallback):
    """Marks finished checkpoints, and stops a training that has diverged."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        complete_checkpoint(Path(args.output_dir or "") / f"checkpoint-{state.global_step}")

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise SPDError(
                f"the training loss became {loss} at step {state.global_step}; lower lr, or load the model with "
                "dtype='float32'"
            )


class _Bar(TrainerCallback):
    """A progress bar with the latest loss."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=not self._shown)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self._bar is not None and "loss" in (logs or {}):
            self._bar.set_postfix(loss=f"{logs['loss']:.4f}")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self._bar.close()


def save_weights(model: nn.Module, directory: Path) -> None:
    """A standard PEFT adapter, or a standard checkpoint, in safetensors."""
    inner: Any = model
    if isinstance(model, PeftModel):
        # "auto" would ask the hub whether the base model's vocabulary has grown
        inner.save_pretrained(str(directory), save_embedding_layers=False)
        (directory / "README.md").unlink(missing_ok=True)  # a model card with nothing filled in
        _in_order(directory / "adapter_config.json", inner.peft_config["default"])
    else:
        inner.save_pretrained(str(directory))


def _in_order(path: Path, config: Any) -> None:
    """PEFT writes its sets in the order of their hashes, which is another in each process."""
    record = read_json(path)
    record |= {name: sorted(record[name]) for name, value in vars(config).items() if isinstance(value, set)}
    write_text(path, json.dumps(record, indent=2, sort_keys=True))
