"""A whole run as the reference code does it, written down plainly: what `benchmarks.whole_run` compares a run with.

It follows docs/protocols.md (github.com/gh540-svg/hahaha, commit e249fec) and takes nothing from spd_lens but texts
that are tokens already: gradients one text at a time, transformers' `generate` in batches of 8 under hooks,
transformers' `Trainer` on texts padded to 256 tokens in batches of 4, test items one at a time. Three things differ
from that code, so that both sides compute the same: completions are greedy and all of one length, training takes the
ids that were generated and not their text, and padding, which is computed, is left out of the loss.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig, PrinterCallback, Trainer, TrainingArguments, set_seed

import spd_lens as spd
from benchmarks.extraction import plain_rows
from spd_lens.models import Encoded, site_layer

GENERATION_BATCH, TRAINING_BATCH, MAX_LENGTH = 8, 4, 256
LR, WEIGHT_DECAY, SEED = 1e-5, 0.01, 42
STAGES = ("extract", "generate", "finetune", "evaluate")


@dataclass(frozen=True)
class Work:
    """What is to be done, in tokens: the same for both sides."""

    sites: Sequence[spd.Site]
    calibration: Sequence[Encoded]
    prompts: Sequence[list[int]]
    items: Sequence[list[int]]
    """Prompts of the test items, which the base model and the trained one complete."""
    new_tokens: int
    """Of each training completion."""
    test_tokens: int
    """Of each answer."""


@dataclass
class Outcome:
    """What a whole run made, and the seconds of each stage by its name; `all` is the whole."""

    seconds: dict[str, float] = field(default_factory=dict)
    completions: list[list[int]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Of each step, in nats per token."""
    answers: dict[str, list[list[int]]] = field(default_factory=dict)
    """New tokens of each test item, by policy: `base` and `spd`."""

    @property
    def generated(self) -> list[list[int]]:
        """All new tokens, text by text."""
        return [*self.completions, *(ids for made in self.answers.values() for ids in made)]


def run(pair: spd.ModelPair, work: Work) -> Outcome:
    """All stages, in order. The pair's twin is trained as a copy, which is made before the clock starts."""
    hf, pad_id, made = pair.hf, pair.pad_id, Outcome()
    trained = copy.deepcopy(hf)

    def timed(stage: str, call: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        result = call(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        made.seconds[stage] = made.seconds.get(stage, 0.0) + time.perf_counter() - start
        return result

    kept = timed("extract", lambda: projectors(plain_rows(pair, work.sites, work.calibration)))
    with projecting(hf, kept):
        made.completions = timed("generate", complete, hf, work.prompts, work.new_tokens, pad_id)
    texts = [[*prompt, *new] for prompt, new in zip(work.prompts, made.completions, strict=True)]
    model, made.losses = timed("finetune", train, trained, texts, pad_id)
    for name, policy in (("base", hf), ("spd", model)):
        made.answers[name] = timed("evaluate", complete, policy, work.items, work.test_tokens, pad_id, 1)
    made.seconds["all"] = sum(made.seconds.values())
    return made


def projectors(rows: Mapping[spd.Site, Sequence[torch.Tensor]]) -> dict[spd.Site, torch.Tensor]:
    """`P`, `[width, width]`, of all heads together and of half rank: the mean taken off, then an SVD."""
    found = {}
    for site, parts in rows.items():
        stacked = torch.cat(list(parts)).float()
        _, _, right = torch.linalg.svd(stacked - stacked.mean(dim=0), full_matrices=False)
        half = right[: stacked.shape[1] // 2]
        found[site] = (half.T @ half).to(parts[0].dtype)
    return found


@contextmanager
def projecting(hf: Any, kept: Mapping[spd.Site, torch.Tensor]) -> Iterator[None]:
    """Hooks on the layers that write keys and values."""

    def project(projector: torch.Tensor, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output @ projector

    with ExitStack() as stack:
        for site, projector in kept.items():
            handle = site_layer(hf, site).module.register_forward_hook(partial(project, projector))
            stack.callback(handle.remove)
        yield


def complete(
    hf: Any, prompts: Sequence[list[int]], n_new: int, pad_id: int, batch_size: int = GENERATION_BATCH
) -> list[list[int]]:
    """Greedy completions of `n_new` tokens each, in order of arrival, padded on the left; no token ends one."""
    made: list[list[int]] = []
    config = GenerationConfig(max_new_tokens=n_new, do_sample=False, eos_token_id=None, pad_token_id=pad_id)
    own, hf.generation_config = hf.generation_config, config  # `generate` would fill in what the model's own asks for
    try:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            longest = max(map(len, batch))
            tokens = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in batch], device=hf.device)
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch], device=hf.device)
            made += hf.generate(input_ids=tokens, attention_mask=mask)[:, longest:].tolist()
    finally:
        hf.generation_config = own
    return made


def train(hf: Any, texts: Sequence[list[int]], pad_id: int) -> tuple[nn.Module, list[float]]:
    """One epoch of LoRA, which is put on the model, and each step's loss. A text is cut or padded to `MAX_LENGTH`."""
    rows = []
    for text in texts:
        ids = text[:MAX_LENGTH]
        rest = MAX_LENGTH - len(ids)
        rows.append(
            {
                "input_ids": ids + [pad_id] * rest,
                "attention_mask": [1] * len(ids) + [0] * rest,
                "labels": ids + [-100] * rest,
            }
        )
    set_seed(SEED)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(
        hf, LoraConfig(r=8, lora_alpha=8, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    )
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=TRAINING_BATCH,
            num_train_epochs=1,
            learning_rate=LR,
            weight_decay=WEIGHT_DECAY,
            lr_scheduler_type="cosine",
            warmup_steps=-(-len(rows) // TRAINING_BATCH) // 2,
            optim="adamw_torch",
            seed=SEED,
            data_seed=SEED,
            use_cpu=hf.device.type == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=args, train_dataset=rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model.eval(), losses
