"""What the units of a study cost in tokens, operations, bytes, seconds and memory, from the model's size alone.

docs/study.md has the rules, docs/scaling.md what they say of large models and how far they are off.
"""

from __future__ import annotations

import math
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from spd_lens import estimators, methods
from spd_lens.models import dtype_name, matrix_rates, resolve_device, resolve_dtype
from spd_lens.runs import N_OTHER, SPDConfig
from spd_lens.sites import resolve_sites
from spd_lens.study.config import BASE, StudyConfig, may_project, named
from spd_lens.study.shapes import Shape
from spd_lens.subspaces import moments_size
from spd_lens.tasks import Task

LENGTHS = {
    "bbh": (105, 4), "codealpaca": (54, 65), "gsm8k": (116, 96), "mbpp": (77, 150), "mmlu": (164, 3),
    "svamp": (96, 16), "synthetic-code": (79, 97), "synthetic-math": (84, 20), "synthetic-qa": (81, 3),
}  # fmt: skip
"""Mean tokens of prompt (in a chat template) and gold completion, of 100 test items with SmolLM2's tokenizer."""
_OTHER_LENGTHS, _SIDE_SETS, _SIDE_TOKENS = (150, 100), 4, 200
"""Lengths of any other task; sets of texts, and tokens of a text, that are supposed for side effects."""
_OTHER_TOKENS = 87
"""Tokens of each of the other texts that a run measures, in SmolLM2's chat template."""
_ANSWER = 10
"""Tokens of an answer without reasoning; gold completions that are no longer are one already, and measured once."""
_BATCH_TOKENS = 2048
"""Padded tokens in a batch of an extraction; a batch that is measured teacher-forced has half."""
_KEPT = 34
"""Values kept per token, layer and unit of d_model for the backward pass (attention scores are not kept)."""
_REACHED = 0.4
"""The share of a machine's rate of matrix products that passes over many texts reach: 0.40 in float32 (AVX2) and 0.42
in bfloat16 of SmolLM2's teacher-forced passes on a core of 2024."""
_SHARDS = 8
"""Shards of the moments of an extraction."""
HELD_PROMPT, HELD_TOKEN = 1200, 48
"""Bytes of main memory for each prompt and each of its tokens, from prompt to record (benchmarks/scaling.py)."""
HELD_ROW, HELD_ROW_TOKEN = 400, 16
"""The same for a text that is trained on, beside its record."""


class Unit(NamedTuple):
    """One piece of work of a stage. What does not apply is empty: the base model has no source and no seed."""

    stage: str
    source: str = ""
    method: str = ""
    seed: int | None = None
    target: str = ""
    phase: str = "trained"

    def __str__(self) -> str:
        parts = [self.method, self.target and f"on {self.target}", self.source and f"from {self.source}"]
        parts += ["" if self.seed is None else f"seed {self.seed}", "" if self.phase == "trained" else self.phase]
        return f"{self.stage}: {', '.join(part for part in parts if part)}"


class Machine(NamedTuple):
    """Effective rates of one device: operations per second, bytes read per second, seconds per layer and new token."""

    name: str
    flops: float
    bandwidth: float
    step: float
    memory: float = math.inf
    """Bytes of memory."""
    recomputes: bool = True
    """Whether training keeps few activations and computes the others once more, as on a GPU."""

    def __str__(self) -> str:
        return (
            f"{self.name}, {self.flops / 1e12:g} TFLOP/s on many tokens at once, {self.bandwidth / 1e9:g} GB/s and "
            f"{self.step * 1e3:g} ms per layer and step while generating"
        )

    @classmethod
    def assumed(cls, device: str, n_bytes: int = 2) -> Machine:
        """One GPU of the paper's kind, or two CPU cores, which are slower where a weight has more than two bytes."""
        if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
            return A100
        return TWO_CORES if n_bytes == 2 else TWO_CORES_FLOAT32

    @classmethod
    def measured(cls, device: str, dtype: str) -> Machine:
        """This machine as it is now, under the settings `device` and `dtype`: its products are timed for a second."""
        place = resolve_device(device)
        weights = resolve_dtype(dtype, place)
        rates, on_gpu = matrix_rates(place, weights), place.type == "cuda"
        step = (A100 if on_gpu else TWO_CORES).step
        return cls(
            f"this machine ({rates.flops / 1e9:.0f} GFLOP/s in products of {dtype_name(weights)} matrices)",
            _REACHED * rates.flops, rates.bandwidth, step, recomputes=on_gpu,
        )  # fmt: skip


# 35 % of a GPU's 312 TFLOP/s and 60 % of its 2 TB/s; SmolLM2-135M on two cores of 2024, with avx512_bf16 and without
A100 = Machine("one A100-80G in bfloat16", 110e12, 1.2e12, 0.8e-3, memory=80e9)
TWO_CORES = Machine("two CPU cores in bfloat16", 0.25e12, 8e9, 0.5e-3, recomputes=False)
TWO_CORES_FLOAT32 = Machine("two CPU cores in float32", 0.1e12, 8e9, 0.5e-3, recomputes=False)


class Cost(NamedTuple):
    """What a unit of work costs."""

    tokens: float = 0.0
    seconds: float = 0.0
    memory: float = 0.0
    """Bytes of one device that holds the whole model."""
    spread: float = 0.0
    """Those among them that belong to layers: where several devices have some layers each, they divide these."""
    flops: float = 0.0
    """Floating-point operations."""
    moved: float = 0.0
    """Bytes between memory and processor: weights, the KV cache, and activations that wait for a backward pass."""
    host: float = 0.0
    """Bytes of main memory for moments, prompts and texts; on a CPU they come on top of `memory`."""

    def on(self, devices: int) -> float:
        """Bytes of each of so many devices that have a share of the layers each."""
        return self.memory - self.spread + self.spread / devices


class Costs:
    """Prices the units of a study one after another: an extraction that an earlier unit has made costs nothing."""

    def __init__(self, config: StudyConfig, shape: Shape, machine: Machine) -> None:
        self.config, self.shape, self.machine = config, shape, machine
        self.n_bytes = bytes_per_weight(config.settings["dtype"], config.settings["device"])
        self.n_policies = len(config.trained) + sum(map(may_project, config.trained))
        self.extracted: set[tuple[Any, ...]] = set()

    def of(self, unit: Unit) -> Cost:
        """The cost of one unit."""
        config, shape, machine = self.config, self.shape, self.machine
        passes = 1 + (1 if unit.method == BASE else self.n_policies)  # one of the base, one of each policy
        logits = 4 * _BATCH_TOKENS * shape.d_vocab
        if unit.stage == "side effects":
            return self._cost(_SIDE_SETS * config.n_side_effects * _SIDE_TOKENS * passes, 2, logits, _BATCH_TOKENS // 2)
        name = config.shared.targets[unit.target] if unit.target else named(config.sources)[unit.source]
        prompt, gold = LENGTHS.get(name, _OTHER_LENGTHS)
        if unit.stage == "measure":
            again = prompt + _ANSWER if gold > _ANSWER and _asks_alone(config.task(name)) else 0
            tokens = config.n_measured(unit.target) * (prompt + gold + again) * passes
            return self._cost(tokens, 2, logits, _BATCH_TOKENS // 2)
        if unit.stage == "score":
            return self._generation(config.n_scored(unit.target), prompt, config.task(name).max_new_tokens, 32)
        cell = config.cell(name, unit.seed or 0)
        if unit.stage == "generate":
            read = _cut(prompt, cell.max_prompt_tokens)
            return self._generation(cell.n_train, read, cell.max_new_tokens, cell.generation_batch_size or 32)
        if unit.stage == "extract":
            if (extraction := _extraction(unit, cell)) in self.extracted:
                return Cost()
            self.extracted.add(extraction)
            lens = shape.n_params * self.n_bytes * (cell.engine == "lens")
            sites = resolve_sites(cell.layers, cell.kinds, shape.n_layers)
            # the graph begins at the first site
            kept = self._kept(_BATCH_TOKENS, shape.n_layers - min(site.layer for site in sites))
            tokens = cell.n_calibration * _cut(prompt + gold, cell.max_calibration_tokens)
            host = moments_size(
                [(shape.n_kv_heads, shape.d_head)] * len(sites), _SHARDS, across_heads=cell.across_heads
            )
            return self._cost(tokens, 4, kept, _BATCH_TOKENS, kept=kept, spread=lens, host=host)
        length, full = _cut(prompt + cell.max_new_tokens, cell.max_length), cell.method == "full"
        if cell.loss_on_padding and cell.max_length is not None:
            length = cell.max_length  # every text is as long as that
        batch = cell.train_batch_size * length
        # a GPU keeps one layer's activations and those between layers, and computes the others once more
        kept = self._kept(batch, 1 + shape.n_layers / _KEPT if machine.recomputes else shape.n_layers)
        trained = 16 * shape.n_params * full  # float32 weights, gradients and moments; those of an adapter are few
        memory = kept + batch * shape.d_vocab * (self.n_bytes + 8)
        held = HELD_PROMPT + HELD_ROW + length * (HELD_TOKEN + HELD_ROW_TOKEN)
        return self._cost(
            cell.epochs * cell.n_train * length, 4 + 2 * machine.recomputes + 2 * full, memory, batch, kept=kept,
            spread=trained, host=cell.n_train * held,
        )  # fmt: skip

    def _cost(
        self, tokens: int, operations: int, memory: float, batch: int, *, kept: float = 0.0, spread: float = 0.0,
        host: float = 0.0,
    ) -> Cost:  # fmt: skip
        """The cost of `operations` per weight and token in batches of `batch` tokens, with `memory` bytes beside those
        of the weights, and `spread` bytes that belong to layers as the weights do. `kept` bytes of a batch are
        written in its forward pass and read in its backward pass.
        """
        shape, spread = self.shape, spread + self.shape.n_params * self.n_bytes
        flops, n_batches = operations * tokens * shape.n_active, -(-tokens // batch)
        moved = n_batches * operations // 2 * shape.n_read(batch) * self.n_bytes + 2 * kept * tokens / batch
        return Cost(tokens, flops / self.machine.flops, memory + spread, spread, flops, moved, host)

    def _generation(self, n: int, prompt: int, new: int, batch_size: int) -> Cost:
        """The cost of `n` completions of `new` tokens, one batch after the other."""
        shape, machine, rows, n_batches = self.shape, self.machine, min(n, batch_size), -(-n // batch_size)
        token = 2 * shape.n_layers * shape.n_kv_heads * shape.d_head * self.n_bytes  # in the KV cache
        cache = token * rows * (prompt + new)
        host = n * (HELD_PROMPT + HELD_TOKEN * (prompt + new))
        read = self._cost(n * prompt, 2, 4 * rows * shape.d_vocab, rows * prompt, spread=cache, host=host)
        flops = 2 * rows * shape.n_active
        moved = shape.n_read(rows) * self.n_bytes + token * rows * (prompt + new / 2)  # of a step, on the mean
        step = max(flops / machine.flops, moved / machine.bandwidth) + machine.step * shape.n_layers
        return read._replace(
            tokens=n * (prompt + new), seconds=read.seconds + n_batches * new * step,
            flops=read.flops + n_batches * new * flops,
            moved=read.moved + n_batches * new * moved + n * token * (prompt + new),
        )  # fmt: skip

    def _kept(self, tokens: int, n_layers: float) -> float:
        """Bytes of activations that the backward pass through some layers needs."""
        return n_layers * tokens * self.shape.d_model * self.n_bytes * _KEPT


def run_seconds(config: SPDConfig, shape: Shape, machine: Machine) -> dict[str, float]:
    """Seconds of each stage of a run: those of a study of one cell, and of the controls that a run has beside it."""
    costs = Costs(StudyConfig.of_run(config), shape, machine)
    costs.n_policies += config.n_random
    n_compared = min(config.n_compared, config.n_train)
    without = Costs(StudyConfig.of_run(config.model_copy(update={"n_train": n_compared})), shape, machine)
    source = next(iter(named([config.task])))
    extract, generate, finetune = (
        Unit(stage, source, "spd", config.seed) for stage in ("extract", "generate", "finetune")
    )
    others = N_OTHER * _OTHER_TOKENS * (1 + costs.n_policies)
    measure, score = ([Unit(stage, target=target) for target in config.targets] for stage in ("measure", "score"))
    return {
        "extract": costs.of(extract).seconds,
        "generate": costs.of(generate).seconds,
        "compare": without.of(generate).seconds,
        "finetune": costs.of(finetune).seconds,
        "effects": sum(costs.of(unit).seconds for unit in measure) + 2 * others * shape.n_active / machine.flops,
        "evaluate": sum(costs.of(unit).seconds for unit in score) * len(config.policies),
    }


def _asks_alone(task: Task) -> bool:
    """Whether a task can ask for an answer without reasoning."""
    return type(task).answer_only is not Task.answer_only


def _cut(n_tokens: int, most: int | None) -> int:
    """Tokens of a text that is cut behind `most` of them, or not at all."""
    return n_tokens if most is None else min(n_tokens, most)


def _extraction(unit: Unit, cell: Any) -> tuple[Any, ...]:
    """A key of the extraction that a unit of stage `extract` needs. Extractions with equal keys are done once.

    The method is asked for its projection, and stopped where it asks for moments.
    """
    asked: list[dict[str, Any]] = []

    def moments(*_: Any, keep: Any = None, **options: Any) -> Any:
        # what the methods of a study need to be kept, every extraction keeps; other defaults say nothing
        asked.append({"loss": cell.loss, **{k: v for k, v in options.items() if v not in ("first", "gold", False)}})
        raise TypeError

    def subspace(*_: Any, estimator: str = "paper", **__: Any) -> Any:
        return estimators.get(estimator).subspace(source, estimators.Shape())

    source: Any = SimpleNamespace(config=cell, moments=moments, gradients=moments, subspace=subspace)
    with suppress(AttributeError, TypeError):
        methods.get(unit.method).projection(source)
    if not asked:  # it looks at the model first: take it that it shares nothing
        return unit.source, unit.method, unit.seed
    return unit.source, str(sorted(asked[0].items())), unit.seed if {"shuffled", "labels"} & {*asked[0]} else None


def bytes_per_weight(dtype: str, device: str) -> int:
    """Bytes of a weight under the settings `dtype` and `device`; the device need not be there."""
    if device.startswith("cuda"):
        dtype, device = "bfloat16" if dtype == "auto" else dtype, "cpu"
    return resolve_dtype(dtype, resolve_device(device)).itemsize
