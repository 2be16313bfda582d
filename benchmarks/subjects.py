"""The models and texts that the benchmarks run on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import spd_lens as spd
from spd_lens.generation import Record
from spd_lens.models import resolve_device
from spd_lens.settings import DEFAULT_MODEL

DATA = Path(os.environ.get("SPD_LENS_DATA", Path(__file__).parents[2] / "shared" / "data"))
"""Folder with the published benchmark files. Without it the synthetic arithmetic task stands in."""

MODELS = ("smollm2", "qwen2.5-0.5b-shape")


@dataclass
class Subject:
    """A model in one dtype."""

    name: str
    pair: spd.ModelPair

    @property
    def dtype(self) -> str:
        return str(self.pair.dtype).removeprefix("torch.")


def subject(name: str, dtype: str = "float32", device: str = "auto", backend: str = "auto") -> Subject:
    """SmolLM2-135M-Instruct with its weights, or random weights in the shape of Qwen2.5-0.5B with SmolLM2's tokenizer.

    Speed does not depend on the weights' values. The random model's embedding has Qwen's 151,936 rows.
    """
    if name == "smollm2":
        return Subject(name, spd.load(DEFAULT_MODEL, dtype=dtype, device=device, backend=backend))
    tokenizer = spd.load(DEFAULT_MODEL, dtype="bfloat16", device="cpu").tokenizer
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    twin = Qwen2ForCausalLM(config).to(getattr(torch, dtype)).to(resolve_device(device))
    return Subject(name, spd.ModelPair(twin, tokenizer, name="random-qwen2.5-0.5b-shape", backend=backend))


def of_numbers(width: int, n_layers: int, n_heads: int, n_kv_heads: int = 1) -> spd.ModelPair:
    """Random weights in the shape of Llama, in float32 on the CPU, with a token for each number up to 999."""
    words = {"</s>": 0} | {str(number): number + 1 for number in range(1000)}
    core = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=4 * width,
        num_hidden_layers=n_layers, num_attention_heads=n_heads, num_key_value_heads=n_kv_heads,
        eos_token_id=0, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return spd.ModelPair(LlamaForCausalLM(config), tokenizer, name=f"random, width {width}, {n_layers} layers")


def numbers(n: int, seed: int) -> str:
    """A text of `n` tokens for it."""
    return " ".join(str((seed * 7919 + i * 104729) % 1000) for i in range(n))


def task() -> spd.tasks.Task:
    """GSM8K, or its synthetic stand-in."""
    path = DATA / "gsm8k"
    return spd.tasks.get("gsm8k", path=path) if path.is_dir() else spd.tasks.get("synthetic-math")


def made_corpus(pair: spd.ModelPair, n: int) -> spd.Corpus:
    """GSM8K's prompts with their gold answers, in the prompt format of the model."""
    return gold_corpus(pair, task().train(n=n, seed=0))


def gold_corpus(pair: spd.ModelPair, examples: Sequence[spd.Example]) -> spd.Corpus:
    """A corpus whose completions are the gold ones."""
    records = []
    for example in examples:
        encoded = pair.encode(example, "full")
        prompt, completion = encoded.ids[: encoded.completion_start], encoded.ids[encoded.completion_start :]
        records.append(
            Record(example.id, example.prompt, example.completion, tuple(prompt), tuple(completion), "length")
        )
    return spd.Corpus(records)
