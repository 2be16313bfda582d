"""`finetune`: distil the corpus into the model, by LoRA or in full (paper section 3.4, Eq. 14)."""

from __future__ import annotations

import contextlib
import copy
import errno
import math
import pickle
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import set_seed

from spd_lens.errors import SPDError, one_line, whole
from spd_lens.files import reading
from spd_lens.generation import Corpus, corpus_digest
from spd_lens.models import (
    Fingerprint,
    ModelPair,
    check_saveable,
    dtype_name,
    fast_products,
    neutrally,
    random_kept,
    recomputed_alike,
    refuse_spread,
    untouched,
    weights_digest,
)
from spd_lens.settings import TrainingKeywords, TrainingSettings
from spd_lens.training.checkpoint_dir import TrainingPlace
from spd_lens.training.early_stop import EarlyStop
from spd_lens.training.length_groups import needs_checkpointing
from spd_lens.training.lora_targets import resolve_targets
from spd_lens.training.loss import IGNORED
from spd_lens.training.parallel import Processes, joined
from spd_lens.training.reports import keep_logs, trackers
from spd_lens.training.rows import Row, corpus_rows
from spd_lens.training.trainer import CorpusTrainer, PlacedArguments


@dataclass(frozen=True)
class How:
    """How a training is done, which does not decide its result."""

    gradient_checkpointing: bool | None
    save_steps: int | None
    progress: bool
    report_to: list[str]
    processes: Processes


@neutrally
def finetune(
    pair: ModelPair,
    corpus: Corpus,
    *,
    settings: TrainingSettings | None = None,
    out: str | Path | None = None,
    gradient_checkpointing: bool | None = None,
    resume: bool = True,
    save_steps: int | None = None,
    progress: bool = True,
    report_to: str = "none",
    parallel: bool = False,
    **keywords: Unpack[TrainingKeywords],
) -> Path:
    """Train on the corpus' own tokens with next-token loss (Eq. 14), and leave the model as it was, bit for bit.

    AdamW with a cosine schedule from `lr` to 0, by default without warm-up, gradients clipped to norm 1. A step's loss
    is the mean over all scored tokens of its sequences. LoRA weights are float32 whatever the model's dtype. On the CPU
    in float32 a seed names one adapter, interrupted or not.

    Args:
        pair: The model pair. If its lens model was built already, lens and twin are first checked to agree.
        corpus: A finished corpus that `generate` made.
        settings: Settings that decide the result. None: the paper's values.
        out: Directory of the result. None: `adapter` beside the corpus file, or a new temporary directory for a corpus
            that has no file.
        gradient_checkpointing: Whether to recompute activations in the backward pass: less memory for a third more
            time, and the same result. None: if a batch of the longest sequences would otherwise take more than half of
            the free memory.
        resume: Whether to continue a training in `out` that was interrupted, and to return one that is finished. False:
            train anew.
        save_steps: Steps between checkpoints. None: one per epoch, and for LoRA, whose checkpoints are small, at least
            every 100 steps. They are deleted at the end.
        progress: Whether to show a progress bar.
        report_to: Where the loss log also goes while it grows: `"none"`, `"tensorboard"`, `"trackio"`, `"wandb"`, or
            another name that transformers knows; several with commas between them.
        parallel: Whether to train together with the other processes that a launcher has started: each calls this with
            the same arguments, and gets the same adapter (docs/parallel-training.md). False: train alone, whatever
            variables a launcher has left.
        **keywords: Single settings, which take precedence over `settings`: method, rank, alpha, dropout,
            targets, lr, weight_decay, epochs, batch_size, gradient_accumulation, loss_on, seed, warmup_epochs,
            early_stop, retokenise, max_length, loss_on_padding.
            `spd_lens.settings.TrainingSettings` says what they mean.

    Returns:
        `out`, with the adapter or checkpoint and `training.json` (settings, loss per step; with `early_stop` also the
        loss per epoch, and which epoch's weights these are).

    Raises:
        SPDError: An empty or unfinished corpus, or another model's; a setting out of range; a text of which nothing is
            left to train on; padding to train on that the tokenizer does not have; a target that the model does not
            have; other settings in `out`; a loss that is no number; memory or disk full; a model on several devices; a
            batch that the processes cannot share; a package to report to that is not installed.
    """
    save_steps = None if save_steps is None else whole("save_steps", save_steps)
    settings = TrainingSettings.given(settings, keywords, "finetune")
    settings.check()
    refuse_spread(pair.hf, "training", "load the model without device_map")
    reports = trackers(report_to)
    with joined(pair.device, parallel) as processes:
        how = How(gradient_checkpointing, save_steps, progress, reports, processes)
        return _finetune(pair, corpus, settings, out, resume, how)


def _finetune(
    pair: ModelPair, corpus: Corpus, settings: TrainingSettings, out: str | Path | None, resume: bool, how: How
) -> Path:
    _check_corpus(pair, corpus)
    rows = corpus_rows(pair, corpus, settings)
    if pair.has_lens:
        pair.check()
    settings = _for_model(settings, pair)
    identity = _identity(pair, corpus, settings)
    processes = how.processes
    processes.check(settings.train_batch_size, identity)
    place = TrainingPlace(Path(processes.first(lambda: _default_out(corpus)) if out is None else out))
    if resume and processes.first(lambda: place.finished(identity)):
        return place.directory
    with contextlib.ExitStack() as stack, random_kept():
        # another number of processes or another engine cannot go on from a checkpoint
        working = place.working(identity | processes.recorded, resume)
        processes.first(lambda: stack.enter_context(working))
        set_seed(settings.seed)  # PEFT and Trainer draw from the global generators
        summary = _train(pair, settings, rows, place, how)
        with _explained(place):
            processes.first(lambda: place.publish({"settings": identity, **processes.recorded, **summary}))
    return place.directory


def _default_out(corpus: Corpus) -> Path:
    return (Path(tempfile.mkdtemp(prefix="spd_")) if corpus.path is None else corpus.path.parent) / "adapter"


def _identity(pair: ModelPair, corpus: Corpus, settings: TrainingSettings) -> dict[str, Any]:
    """Everything that decides the result, as `training.json` records it."""
    return {
        "model": pair.name,
        "weights": weights_digest(pair.hf),
        "dtype": dtype_name(pair.dtype),
        "corpus": corpus_digest(corpus),
        **settings.recorded(),
        **settings.label,
    }


def _for_model(settings: TrainingSettings, pair: ModelPair) -> TrainingSettings:
    """The settings with the names that the model has for the LoRA targets, or `SPDError` if it cannot be trained so."""
    targets = settings.lora_targets
    targets = [targets] if isinstance(targets, str) else list(targets)
    if settings.full:
        check_saveable(pair.hf)
    else:
        targets = list(resolve_targets(pair.hf, targets))
    return settings.model_copy(update={"lora_targets": targets})


def _train(
    pair: ModelPair,
    settings: TrainingSettings,
    rows: Sequence[Row],
    place: TrainingPlace,
    how: How,
) -> dict[str, Any]:
    """Write the adapter or checkpoint to `place.result`, and say how the training went."""
    start = time.monotonic()
    processes = how.processes
    n_scored = longest = 0
    for row in rows:
        n_scored += sum(label != IGNORED for label in row["labels"])
        longest = max(longest, len(row["input_ids"]))
    with _trainable(pair, settings, processes.sharded) as model:
        if _checkpoints_gradients(pair, settings, longest, model, how):
            _checkpoint_gradients(model)
        per_epoch = _steps_per_epoch(settings, len(rows))
        args = _arguments(pair, settings, per_epoch, place, how)
        stop = EarlyStop(place, per_epoch) if settings.early_stop else None
        on_device = torch.cuda.device(pair.device) if pair.device.type == "cuda" else contextlib.nullcontext()
        with on_device, _explained(place), fast_products(pair.device, pair.dtype):
            trainer = CorpusTrainer(
                model, args, rows, pair.pad_id, how.progress and not processes.index, [stop] if stop else [], processes
            )
            if processes.index:
                torch.manual_seed(settings.seed + processes.index)  # noise of its own; the weights are the first's
            noted = _fit(trainer, place, stop, settings.epochs, processes)
            if settings.full:
                processes.first(lambda: pair.tokenizer.save_pretrained(place.result))
    return {
        "n_sequences": len(rows),
        "n_scored_tokens": n_scored,
        "n_steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - start, 1),  # of this process: a resumed training took longer
        **noted,
        "log": trainer.loss_log,
    }


def _checkpoints_gradients(
    pair: ModelPair, settings: TrainingSettings, longest: int, model: nn.Module, how: How
) -> bool:
    """Whether activations are recomputed: what was asked for, else what memory allows the first process."""
    if how.gradient_checkpointing is not None:
        return how.gradient_checkpointing
    n_trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    n_tokens = settings.train_batch_size // how.processes.count * longest
    return how.processes.first(lambda: needs_checkpointing(pair, n_tokens, n_trained))


def _fit(
    trainer: CorpusTrainer, place: TrainingPlace, stop: EarlyStop | None, n_epochs: int, processes: Processes
) -> dict[str, Any]:
    """Train from the latest checkpoint on, write the weights to `place.result`, and say what `training.json` notes."""
    if stop is None:
        _go_on(trainer, processes.first(place.latest_checkpoint))
        trainer.save_model(str(place.result), _internal_call=True)
        return {}
    checkpoint = processes.first(lambda: place.latest_checkpoint(stop.best_epoch))
    if checkpoint is not None and (ended := stop.ended(checkpoint)):  # killed at the very end: Trainer would go on
        trainer.state = ended
    else:
        _go_on(trainer, checkpoint)
    report = stop.report(trainer.state, n_epochs)
    processes.first(lambda: place.take_epoch(report["epoch"]))
    return {"early_stop": report}


def _go_on(trainer: CorpusTrainer, checkpoint: str | None) -> None:
    """Train from a checkpoint on."""
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except pickle.UnpicklingError as error:
        raise SPDError(
            f"{checkpoint} holds something else than numbers, which was not loaded ({one_line(error, 120)}); delete "
            "that directory, and the same call goes on from before it"
        ) from error


def _check_corpus(pair: ModelPair, corpus: Corpus) -> None:
    """Raise `SPDError` if a corpus is not one for this model."""
    if not isinstance(corpus, Corpus):
        raise SPDError(
            f"finetune takes a Corpus, which generate makes and Corpus.load(path) reads, not a {type(corpus).__name__}"
        )
    if not len(corpus):
        raise SPDError("the corpus is empty, so there is nothing to train on; generate completions first")
    if not corpus.complete:
        raise SPDError(
            f"the corpus {corpus.path} is not finished ({len(corpus)} completions so far); "
            "run generate with the same settings to finish it"
        )
    fingerprint = corpus.settings.get("fingerprint")
    if fingerprint is not None:
        with reading(corpus.path or "the corpus"):
            Fingerprint.from_dict(fingerprint, "the corpus").check(pair.fingerprint, "the corpus")
    d_vocab = pair.hf.get_input_embeddings().weight.shape[0]
    for record in corpus:
        ids = record.prompt_ids + record.completion_ids
        if len(ids) < 2:
            raise SPDError(f"the completion of prompt {record.id!r} has {len(ids)} tokens, and training needs two")
        if len(ids) > pair.n_ctx or not all(0 <= token < d_vocab for token in ids):
            raise SPDError(
                f"the completion of prompt {record.id!r} does not fit the model: {len(ids)} tokens (context "
                f"{pair.n_ctx}), largest id {max(ids)} (vocabulary {d_vocab}); was it generated by another model?"
            )


def _steps_per_epoch(settings: TrainingSettings, n_rows: int) -> int:
    return math.ceil(math.ceil(n_rows / settings.train_batch_size) / settings.gradient_accumulation)


def _arguments(
    pair: ModelPair, settings: TrainingSettings, per_epoch: int, place: TrainingPlace, how: How
) -> PlacedArguments:
    every = how.save_steps or (per_epoch if settings.full else min(per_epoch, 100))
    keep_logs(place.directory)
    args = PlacedArguments(
        output_dir=str(place.checkpoints),
        per_device_train_batch_size=settings.train_batch_size // how.processes.count,
        gradient_accumulation_steps=settings.gradient_accumulation,
        num_train_epochs=settings.epochs,
        optim="adamw_torch",
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=int(settings.warmup_epochs * per_epoch),
        max_grad_norm=1.0,
        # full training keeps float32 weights and computes in the model's own precision, as LoRA on it does
        bf16=settings.full and pair.dtype == torch.bfloat16,
        seed=settings.seed,
        data_seed=settings.seed,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,  # the newest may be half-written when the process is killed
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would log an earlier loss in place of NaN
        report_to=how.report_to,
        project="spd_lens",
        run_name=place.directory.name,
        disable_tqdm=True,  # `CorpusTrainer` shows its own bar
        use_cpu=pair.device.type == "cpu",
        dataloader_pin_memory=pair.device.type == "cuda",
        remove_unused_columns=False,
        average_tokens_across_devices=False,  # every process counts those of whole batches
        ddp_find_unused_parameters=settings.full,  # such as experts that no token went to; LoRA has none
    )
    args.place(pair.device)
    args._n_gpu = min(args.n_gpu, 1)  # several visible GPUs would make Trainer split every batch over them
    return args


@contextlib.contextmanager
def _trainable(pair: ModelPair, settings: TrainingSettings, sharded: bool) -> Iterator[nn.Module]:
    """The model to train. LoRA matrices are put on the twin and come off again; in full, a copy is trained, and where
    its weights are sharded, LoRA is put on a copy."""
    if settings.full:
        # float32, since steps of 1e-5 vanish in bfloat16 weights
        model = copy.deepcopy(pair.hf).to(torch.float32).requires_grad_(True)
        yield model.train()
        return
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=_lasting_name(pair.name),
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]  # a fraction works too
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_targets,
    )
    twin = copy.deepcopy(pair.hf) if sharded else pair.hf
    with untouched(pair.hf, writable=False):  # PEFT writes into modules and configs, and trains only what it adds
        model: Any = get_peft_model(twin, config)  # type: ignore[no-redef]  # keeps its own weights in float32
        model.peft_config["default"].base_model_name_or_path = config.base_model_name_or_path
        yield model.train()


def _checkpoint_gradients(model: Any) -> None:
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    # the newer name first: the older one warns where both exist
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": recomputed_alike(inner.device, inner.dtype)})


def _lasting_name(name: str) -> str:
    """A hub name as it is, a local path made absolute: the adapter may be used from another directory."""
    return str(Path(name).expanduser().resolve()) if Path(name).expanduser().exists() else name


@contextlib.contextmanager
def _explained(place: TrainingPlace) -> Iterator[None]:
    """Memory and disk that run out are no programming errors."""
    again = "the latest checkpoint is kept, and the same call continues from it"
    failed = f"training cannot write to {place.scratch}"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SPDError(
            "training ran out of memory; lower batch_size and raise gradient_accumulation, or set "
            f"gradient_checkpointing=True ({again} unless batch_size changes)"
        ) from error
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", errno.ENOSPC) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise SPDError(f"{failed} ({error}); {'make room: ' if full else ''}{again}") from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error):  # how torch.save reports a full disk
            raise
        raise SPDError(f"{failed} ({error}); make room: {again}") from error
