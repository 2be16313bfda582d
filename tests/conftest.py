"""Tiny random models with a small real tokenizer, built once per test run.

The models have 4 layers, 4 query and 2 key/value heads of 8 dimensions, float32, and weights large enough that logits
are far from flat: completions vary, and a mistake in the mask or the cache changes tokens. Treat the session's pairs
as read-only, or leave them as they were.
"""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from spd_lens.cli.commands import main
from spd_lens.models.load import load
from spd_lens.models.pair import ModelPair
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.pipeline import run
from spd_lens.runs.run_dir import Run
from tests import fake_device

# One thread each: tiny models gain nothing from more, and threads of several test workers hold each other up.
torch.set_num_threads(1)
if not torch.cuda.is_available():
    fake_device.register()


def pytest_collection_finish() -> None:
    """What imports made stays to the end: whoever collects garbage (accelerate, statsmodels) need not look at it."""
    gc.collect()
    gc.freeze()


TEXTS = (
    "Tom has 12 apples and buys 30 more. How many apples does he have now? 12 + 30 = 42. The answer is 42.",
    "A baker sells 7 loaves at 3 dollars each. How much money does she make? 7 * 3 = 21. #### 21",
    "def add(a, b):\n    return a + b\n\nassert add(2, 3) == 5",
    "def double(values):\n    return [2 * value for value in values]\n\nassert double([1, 2]) == [2, 4]",
    "Which planet is the largest? A. Earth B. Mars C. Jupiter D. Venus Answer: C",
    "Question: Sara reads 15 pages a day. How many pages does she read in 4 days?\nAnswer: 15 * 4 = 60 pages.",
)
"""What the tokenizer is trained on; the byte-level alphabet covers everything else."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""Brings its own BOS, as most do, and ends a turn with a token that is not the model's EOS."""

SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|start|>", "<|end|>")
"""Their ids are 0 to 4."""

N_CTX = 256

BACKENDS = (
    ("hooked", "bridge") if Version(importlib.metadata.version("transformer-lens")) < Version("4") else ("bridge",)
)
"""Those of this lane."""


def build_tokenizer(*, chat: bool, bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer. `bos`: put BOS before raw text, as Llama does; Qwen does not."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    steps: list[processors.PostProcessor] = [processors.ByteLevel(trim_offsets=False)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]))
    core.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|start|>", "<|end|>"],
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def randomise(model: PreTrainedModel, *, seed: int = 0, std: float = 0.25) -> PreTrainedModel:
    """Gaussian weights and biases; norm weights near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name
            parameter.copy_(1 + 0.1 * noise if is_norm else std * noise)
    return model.eval()


def _dimensions(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": N_CTX,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_llama(tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    """Llama: no biases. `tied`: one matrix embeds and unembeds."""
    config = LlamaConfig(**_dimensions(tokenizer) | {"tie_word_embeddings": tied}, head_dim=8)
    return randomise(LlamaForCausalLM(config), seed=seed)


def build_qwen2(tokenizer: PreTrainedTokenizerFast, *, seed: int = 1) -> Qwen2ForCausalLM:
    """Qwen2: biases on q, k and v, here random and not zero."""
    return randomise(Qwen2ForCausalLM(Qwen2Config(**_dimensions(tokenizer))), seed=seed)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama checkpoint whose tokenizer has no chat template and prepends BOS."""
    tokenizer = build_tokenizer(chat=False)
    # the directory must not be named after a model family: TransformerLens goes by such names
    return _save(build_llama(tokenizer), tokenizer, tmp_path_factory.mktemp("tiny_a"))


@pytest.fixture(scope="session")
def tiny_qwen2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 checkpoint with biases, whose tokenizer has a chat template and prepends nothing to raw text."""
    tokenizer = build_tokenizer(chat=True, bos=False)
    return _save(build_qwen2(tokenizer), tokenizer, tmp_path_factory.mktemp("tiny_b"))


@pytest.fixture(scope="session")
def tiny_pair(tiny_llama_dir: Path) -> ModelPair:
    """The Llama as a pair in float32: raw prompts."""
    return load(str(tiny_llama_dir), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def tiny_qwen2_pair(tiny_qwen2_dir: Path) -> ModelPair:
    """The Qwen2 as a pair in float32: chat prompts."""
    return load(str(tiny_qwen2_dir), dtype="float32", device="cpu")


@pytest.fixture(scope="session", params=["llama", "qwen2"])
def any_tiny_pair(request: pytest.FixtureRequest) -> ModelPair:
    """Both tiny pairs, one after the other."""
    return request.getfixturevalue("tiny_pair" if request.param == "llama" else "tiny_qwen2_pair")


@pytest.fixture(scope="session")
def pair_of(tiny_llama_dir: Path, tiny_qwen2_dir: Path) -> Callable[..., ModelPair]:
    """`pair_of("qwen2", "bridge", "float64")`, built once and shared by all tests: leave it as it was."""

    @cache
    def _pair_of(family: str, backend: str = "auto", dtype: str = "float32") -> ModelPair:
        directory = {"llama": tiny_llama_dir, "qwen2": tiny_qwen2_dir}[family]
        return load(str(directory), backend=backend, dtype=dtype, device="cpu")

    return _pair_of


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each TransformerLens generation that this lane has."""
    return request.param


@pytest.fixture(scope="session", params=["llama", "qwen2"])
def family(request: pytest.FixtureRequest) -> str:
    """Llama: no biases, raw prompts with BOS. Qwen2: biases, chat prompts."""
    return request.param


@pytest.fixture
def fresh_pair(tiny_llama_dir: Path) -> ModelPair:
    """A Llama pair of the test's own, to change at will."""
    return load(str(tiny_llama_dir), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def processes() -> Iterator[BaseContext]:
    """Processes that start in a moment, from a server that has imported everything."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            patch.setenv(variable, "1")  # as in the tests' own process
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["spd_lens.runs.pipeline"])
        yield context


@pytest.fixture(scope="session")
def tiny_prompts() -> list[str]:
    """Prompts of quite different lengths, so that batches need padding."""
    return [
        "Tom has 12 apples.",
        "How many pages does Sara read in 4 days if she reads 15 pages a day and 3 more on each Sunday?",
        "def add(a, b):",
        "Which planet is the largest? A. Earth B. Mars C. Jupiter D. Venus",
        "7 * 3",
        "A baker sells 7 loaves at 3 dollars each. How much money does she make?",
    ]


@pytest.fixture(scope="session")
def state_of() -> Callable[[torch.nn.Module], dict[str, torch.Tensor]]:
    """A copy of all parameters and buffers, to compare bit for bit later."""
    return lambda model: {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="session")
def tiny_settings(tiny_llama_dir: Path) -> dict[str, Any]:
    """Settings of a whole run of seconds, which still does all that a run does."""
    return {
        "model": str(tiny_llama_dir),
        "dtype": "float32",
        "device": "cpu",
        "task": "synthetic-math",
        "task_options": {"max_new_tokens": 8},
        "n_calibration": 6,
        "n_train": 12,
        "n_eval": 12,
        "n_compared": 6,
        "n_random": 2,
        "max_new_tokens": 8,
        "generation_batch_size": 4,
        "train_batch_size": 4,
        "epochs": 2,
        "lr": 0.01,
        "policies": ["base", "projected", "spd"],
    }


@pytest.fixture(scope="session")
def finished_run(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was never disturbed. Copy it before changing it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return run(SPDConfig.make(tiny_settings), out, progress=False)


@pytest.fixture
def call(monkeypatch, capfd):
    """Run `spd-lens` with some arguments in this process: exit code, stdout and stderr."""
    level, verbosity = logging.getLogger("spd_lens").level, transformers.utils.logging.get_verbosity()

    def _call(*arguments):
        monkeypatch.setattr(sys, "argv", ["spd-lens", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stop:
            main()
        output = capfd.readouterr()
        return stop.value.code or 0, output.out, output.err

    yield _call
    logging.getLogger("spd_lens").setLevel(level)
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
