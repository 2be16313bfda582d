"""What the stages of a study cost in tokens, memory and seconds, from the model's shape alone.

The throughput model: multiplications and additions (2 per weight and token forward, 2 more backward to the activations
of frozen weights) over an assumed rate; generation also reads all weights once per step, and pays for starting each
layer's kernels. Documented in docs/study.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from spd_lens.config import SPDConfig
from spd_lens.sites import resolve_sites
from spd_lens.study.shapes import Shape

LENGTHS: dict[str, tuple[int, int]] = {
    "bbh": (105, 4),
    "codealpaca": (54, 65),
    "gsm8k": (116, 96),
    "mbpp": (77, 150),
    "mmlu": (164, 3),
    "svamp": (96, 16),
    "synthetic-code": (79, 97),
    "synthetic-math": (84, 20),
    "synthetic-qa": (81, 3),
}
"""Mean tokens of prompt (in a chat template) and gold completion, of 100 test items with SmolLM2's tokenizer."""
_OTHER_LENGTHS = (150, 100)
_BATCH_TOKENS = 2048
"""Padded tokens per batch of `extract`; `teacher_forced` takes half."""
_ACTIVATIONS_PER_LAYER = 34
"""Values kept per token, layer and unit of d_model for the backward pass (attention scores are not kept)."""


@dataclass(frozen=True)
class Machine:
    """Effective rates, not peak ones."""

    name: str
    flops: float
    """Operations per second of large matrix products: forward passes of many tokens, and training."""
    bandwidth: float
    """Bytes per second at which weights are read while generating."""
    step: float
    """Seconds that each layer costs per generated token, however little it computes."""

    def __str__(self) -> str:
        return (
            f"{self.name}, {self.flops / 1e12:g} TFLOP/s on many tokens at once, {self.bandwidth / 1e9:g} GB/s and "
            f"{self.step * 1e3:g} ms per layer and step while generating"
        )

    @classmethod
    def assumed(cls, device: str, n_bytes: int = 2) -> Machine:
        """One GPU of the paper's kind for `cuda`, and for `auto` where there is a GPU; else two CPU cores.

        `n_bytes` of a weight: CPUs multiply bfloat16 twice as fast as float32 where they have instructions for it.
        """
        if device == "auto":
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda"):
            return A100
        return TWO_CORES if n_bytes == 2 else TWO_CORES_FLOAT32


A100 = Machine("one A100-80G in bfloat16", 110e12, 1.2e12, 0.8e-3)
"""35 % of 312 TFLOP/s and 60 % of 2 TB/s. The paper used four of them; a study runs on one."""
TWO_CORES = Machine("two CPU cores in bfloat16", 0.25e12, 8e9, 0.5e-3)
"""As measured with SmolLM2-135M on two cores of 2024 with avx512_bf16."""
TWO_CORES_FLOAT32 = Machine("two CPU cores in float32", 0.1e12, 8e9, 0.5e-3)


@dataclass(frozen=True)
class Cost:
    """Tokens and seconds add up; memory, in bytes by what it is for, is that of the largest."""

    tokens: float = 0.0
    seconds: float = 0.0
    memory: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def total(cls, costs: Iterable[Cost]) -> Cost:
        """Of several units, one after another."""
        listed = list(costs)
        largest = max(listed, key=lambda cost: sum(cost.memory.values()))
        return cls(sum(cost.tokens for cost in listed), sum(cost.seconds for cost in listed), largest.memory)


class Costs:
    """Cost of one unit of each stage."""

    def __init__(self, shape: Shape, machine: Machine, config: SPDConfig) -> None:
        self.shape, self.machine = shape, machine
        self.n_bytes = bytes_per_weight(config.dtype, config.device)
        self.weights = float(shape.n_params * self.n_bytes)
        self.on_gpu = machine not in (TWO_CORES, TWO_CORES_FLOAT32)

    def lengths(self, task: str) -> tuple[int, int]:
        """Typical tokens of a task's prompts and gold completions."""
        return LENGTHS.get(task, _OTHER_LENGTHS)

    def extract(self, task: str, config: SPDConfig) -> Cost:
        """Forward and backward on the calibration examples (Eq. 6-8)."""
        tokens = config.n_calibration * sum(self.lengths(task))
        memory = {
            "weights": self.weights * (2 if config.engine == "lens" else 1),
            "activations": self._activations(_BATCH_TOKENS) * self._share_above(config),
        }
        return Cost(tokens, self._dense(tokens, 4), memory)

    def generate(self, task: str, config: SPDConfig) -> Cost:
        """One completion per training prompt (Eq. 13)."""
        prompt = self.lengths(task)[0]
        return self._generation(config.n_train, prompt, config.max_new_tokens, config.generation_batch_size or 32)

    def score(self, n: int, task: str, max_new_tokens: int, batch_size: int = 32) -> Cost:
        """One greedy completion per test item."""
        return self._generation(n, self.lengths(task)[0], max_new_tokens, batch_size)

    def finetune(self, task: str, config: SPDConfig) -> Cost:
        """All epochs (Eq. 14)."""
        length = self.lengths(task)[0] + config.max_new_tokens
        tokens = config.epochs * config.n_train * length
        in_batch = config.train_batch_size * length
        # forward, backward to the activations; once more forward where they are not kept, once more for full weights
        passes = 4 + (2 if self.on_gpu else 0) + (2 if config.method == "full" else 0)
        memory = {
            "weights": self.weights if config.method == "lora" else self.weights + 4.0 * self.shape.n_params,
            "optimiser": 12.0 * self._n_trained(config),
            "logits": in_batch * self.shape.d_vocab * (self.n_bytes + 8.0),
            "activations": self._activations(in_batch, checkpointed=self.on_gpu),
        }
        return Cost(tokens, self._dense(tokens, passes) + self._unembedding(tokens, passes), memory)

    def measure(self, n: int, lengths: tuple[int, int], n_policies: int) -> Cost:
        """Teacher-forced passes of the base and of each policy over the same items."""
        tokens = n * sum(lengths) * (n_policies + 1)
        scored = n * lengths[1] * (n_policies + 1)
        memory = {"weights": self.weights, "logits": 8.0 * _BATCH_TOKENS / 2 * self.shape.d_vocab}
        return Cost(tokens, self._dense(tokens, 2) + self._unembedding(scored, 2), memory)

    def _generation(self, n: int, prompt: int, new: int, batch_size: int) -> Cost:
        shape, machine = self.shape, self.machine
        rows = min(n, batch_size)
        n_batches = -(-n // batch_size)
        flops = 2 * rows * (shape.n_block_params + shape.d_vocab * shape.d_model)
        step = max(flops / machine.flops, self.weights / machine.bandwidth) + machine.step * shape.n_layers
        cache = 2.0 * shape.n_layers * shape.n_kv_heads * shape.d_head * self.n_bytes * rows * (prompt + new)
        memory = {"weights": self.weights, "KV cache": cache, "logits": 4.0 * rows * shape.d_vocab}
        return Cost(n * (prompt + new), n_batches * new * step + self._dense(n * prompt, 2), memory)

    def _dense(self, tokens: float, passes: float) -> float:
        """Seconds for `passes` operations per weight of the blocks and token."""
        return passes * tokens * self.shape.n_block_params / self.machine.flops

    def _unembedding(self, tokens: float, passes: float) -> float:
        """The same for the unembedding, which not every token needs."""
        return passes * tokens * self.shape.d_vocab * self.shape.d_model / self.machine.flops

    def _activations(self, tokens: int, *, checkpointed: bool = False) -> float:
        """What the backward pass needs: of all layers, or of one and the residual stream between layers."""
        one = float(tokens * self.shape.d_model * self.n_bytes)
        layers = 1 if checkpointed else self.shape.n_layers
        return layers * one * _ACTIVATIONS_PER_LAYER + (self.shape.n_layers * one if checkpointed else 0)

    def _share_above(self, config: SPDConfig) -> float:
        """Share of the layers that keep a graph: those from the first target layer on."""
        sites = resolve_sites(config.layers, config.kinds, self.shape.n_layers)
        return 1 - min(site.layer for site in sites) / self.shape.n_layers

    def _n_trained(self, config: SPDConfig) -> float:
        if config.method == "full":
            return float(self.shape.n_params)
        found = [widths for name in config.lora_targets if (widths := self.shape.widths(name))]
        return float(self.shape.n_layers * sum(config.lora_rank * (i + o) for i, o in found))


def bytes_per_weight(dtype: str, device: str) -> int:
    """Of the setting `dtype`; `auto` is bfloat16 on a GPU and where the CPU multiplies it."""
    if dtype == "auto":
        if device.startswith("cuda"):
            return 2
        from spd_lens.models.devices import resolve_device, resolve_dtype

        dtype = str(resolve_dtype("auto", resolve_device(device))).removeprefix("torch.")
    return {"float64": 8, "float32": 4}.get(dtype, 2)
