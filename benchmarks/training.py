"""LoRA training (Eq. 14): `finetune` against TRL's `SFTTrainer` on the same tokens in the same order."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

import spd_lens as spd
from benchmarks import subjects
from benchmarks.bounds import training_seconds
from benchmarks.measure import Sample, settle, timed
from benchmarks.table import Row
from spd_lens.generation import Record
from spd_lens.training import ATTENTION

BATCH = 8
"""The paper's, as far as it says."""
LR = 1e-4
SEED = 42
GOAL = 1.2


@dataclass
class Training:
    """What one training says of itself: seconds and loss of each step."""

    seconds: list[float]
    losses: list[float]


class Stopwatch(TrainerCallback):
    """Time of each step, optimizer included; start-up, checkpoints and logging are not in it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        _wait()
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        _wait()
        self.seconds.append(time.perf_counter() - self._start)


def rows(models: list[str], quick: bool) -> Iterator[Row]:
    """Rows of every model and dtype."""
    for name in models:
        for dtype in ("float32", "bfloat16"):
            yield from _training(subjects.subject(name, dtype), quick)
            settle()


def _training(subject: subjects.Subject, quick: bool) -> Iterator[Row]:
    corpus = subjects.made_corpus(subject.pair, n=BATCH * _n_steps(subject, quick))
    ways: dict[str, Callable[[], Training]] = {
        "ours": partial(ours, subject.pair, corpus),
        "default": partial(theirs, subject.pair, corpus),
        "plain": partial(theirs, subject.pair, corpus, gradient_checkpointing=False),
    }
    ours(subject.pair, spd.Corpus(corpus.records[:2]))  # a warm-up
    samples = {way: timed(call) for way, call in ways.items()}
    n_tokens = sum(len(_ids(record)) for record in corpus)
    ideal = training_seconds(subject.pair, n_tokens)
    for way, what, target in (
        ("plain", "SFTTrainer without gradient checkpointing", GOAL),
        ("default", "SFTTrainer as it comes, with gradient checkpointing", None),
    ):
        yield _speed(subject, what, samples["ours"], samples[way], n_tokens, ideal, target)
        yield _memory(subject, what, samples["ours"], samples[way])
    yield _bound(subject, samples["ours"], ideal)
    yield _equal(subject, samples["ours"].result, samples["plain"].result)


def _n_steps(subject: subjects.Subject, quick: bool) -> int:
    if quick:
        return 2
    if subject.pair.device.type == "cuda":
        return 24
    return {"smollm2": 4, "qwen2.5-0.5b-shape": 3}[subject.name]


def ours(pair: spd.ModelPair, corpus: spd.Corpus) -> Training:
    """`finetune` as it comes, but for the dropout: noise would not be the same for both."""
    with tempfile.TemporaryDirectory() as scratch, _timed_steps() as watch:
        out = spd.finetune(
            pair, corpus, out=Path(scratch) / "adapter", epochs=1, batch_size=BATCH, lr=LR, dropout=0.0, seed=SEED,
            progress=False,
        )  # fmt: skip
        log = json.loads((out / "training.json").read_text())["log"]
    return Training(watch.seconds, [entry["loss"] for entry in log])


def theirs(pair: spd.ModelPair, corpus: spd.Corpus, **options: Any) -> Training:
    """`SFTTrainer` on the same tokens; what is set beside the hyperparameters is there to make the two comparable."""
    with tempfile.TemporaryDirectory() as scratch, _timed_steps() as watch:
        args = SFTConfig(
            output_dir=scratch,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            learning_rate=LR,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            warmup_steps=0,
            optim="adamw_torch",
            seed=SEED,
            data_seed=SEED,
            bf16=pair.dtype == torch.bfloat16,
            use_cpu=pair.device.type == "cpu",
            completion_only_loss=False,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        trainer = SFTTrainer(
            model=copy.deepcopy(pair.hf).requires_grad_(True),
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": [_ids(record) for record in corpus]}),
            processing_class=pair.tokenizer,
            peft_config=LoraConfig(
                r=8, lora_alpha=8, lora_dropout=0.0, target_modules=list(ATTENTION), task_type="CAUSAL_LM"
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Training(watch.seconds, log)


class _timed_steps:
    """A stopwatch among the callbacks of every `Trainer` that is made inside."""

    def __enter__(self) -> Stopwatch:
        self._watch = Stopwatch()
        transformers.trainer.DEFAULT_CALLBACKS.append(self._watch)
        return self._watch

    def __exit__(self, *_: object) -> None:
        transformers.trainer.DEFAULT_CALLBACKS.remove(self._watch)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _ids(record: Record) -> list[int]:
    return [*record.prompt_ids, *record.completion_ids]


def _speed(
    subject: subjects.Subject, what: str, own: Sample, peer: Sample, n_tokens: int, ideal: float, target: float | None
) -> Row:
    """Step by step, each of the same sequences; the first step is not counted where there are more."""
    first = 1 if len(own.result.seconds) > 2 else 0
    pairs = list(zip(own.result.seconds, peer.result.seconds, strict=True))[first:]
    each = [theirs / ours for ours, theirs in pairs]
    rates = [n_tokens / sum(sample.result.seconds) for sample in (own, peer)]
    return Row.of(
        "training", subject.name, subject.dtype, what, each, target=target,
        bound=f"{sum(peer.result.seconds) / ideal:.2f} (matrix products alone)",
        ours=f"{rates[0]:.0f} tok/s", peer=f"{rates[1]:.0f} tok/s",
        note=f"batches of {BATCH}, {len(pairs)} steps",
    )  # fmt: skip


def _memory(subject: subjects.Subject, what: str, own: Sample, peer: Sample) -> Row:
    ratio = own.peak / peer.peak
    return Row.of(
        "training", subject.name, subject.dtype, f"peak memory over that of {what}", [ratio],
        target=1.0 if "without" in what else None, at_least=False,
        ours=f"{own.peak / 2**20:.0f} MiB", peer=f"{peer.peak / 2**20:.0f} MiB",
    )  # fmt: skip


def _bound(subject: subjects.Subject, own: Sample, ideal: float) -> Row:
    ratio = sum(own.result.seconds) / ideal
    return Row.of(
        "training", subject.name, subject.dtype, "time over that of its matrix products alone", [ratio],
        at_least=False, ours=f"{sum(own.result.seconds):.1f} s", peer=f"{ideal:.1f} s",
    )  # fmt: skip


def _equal(subject: subjects.Subject, own: Training, peer: Training) -> Row:
    each = [abs(a - b) / b for a, b in zip(own.losses, peer.losses, strict=True)]
    return Row(
        "training", subject.name, subject.dtype, "loss of a step: largest relative difference from SFTTrainer's",
        max(each), min(each), max(each), 1e-4 if subject.dtype == "float32" else None, at_least=False, unit="",
    )  # fmt: skip
