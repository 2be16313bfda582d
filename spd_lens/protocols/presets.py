"""The three protocols. `docs/protocols.md` is written from here (`python scripts/protocol_table.py`)."""

from __future__ import annotations

from typing import Any

from spd_lens.protocols.base import Protocol, Source

POINTS: dict[str, tuple[str, ...]] = {
    "prompts": ("prompt_format", "add_special_tokens", "prompt_template"),
    "tokens that count as correctness": ("span", "span_rule", "max_calibration_tokens", "too_long", "loss"),
    "target layers": ("layers", "kinds"),
    "centring of the gradients": ("center_gradients",),
    "projector": ("estimator", "per_head", "rank", "energy", "strength", "center"),
    "calibration examples": ("n_calibration",),
    "training prompts": ("n_train", "train_source"),
    "order of examples": ("order",),
    "self-generation": ("temperature", "top_p", "top_k", "max_new_tokens", "max_prompt_tokens"),
    "training text": ("retokenise", "max_length", "loss_on_padding", "loss_on"),
    "optimiser": ("lr", "weight_decay", "train_batch_size", "warmup_epochs", "epochs", "early_stop"),
    "what is trained": ("method", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),
    "precision": ("dtype",),
    "scores": ("scoring", "test tokens", "subtasks"),
    "test items": ("n_eval",),
    "seeds": ("seed", "data_seed"),
    "methods of a study": ("methods",),
}
"""The points of the table, and the settings and options of tasks that decide each of them."""

_CODE = "reference code"
_OURS = "this project's default"
_NONE = "no source"
_CARDS = "model cards of SimpleSD-4B-instruct and SimpleSD-30B-instruct"
_ACCOUNT = (
    "a published account of arXiv 2604.01193's experimental set-up (sesamedisk.com/self-distillation-code-generation)"
)

PAPER = Protocol(
    name="paper",
    says="the paper (arXiv 2605.22675) as this project reads it, and its own defaults where the paper is silent",
    sources={
        "prompts": Source("the chat template where there is one; the task's own request", _OURS),
        "tokens that count as correctness": Source("every token that overlaps a span", "Eq. 6, table 6"),
        "target layers": Source("{L, ⌊L/2⌋} counted from 1: blocks 23 and 11 of 24", "section 3.1, A.3"),
        "centring of the gradients": Source("", "Eq. 8-9"),
        "projector": Source("rank, strength and no centre: Eq. 9-12; a projector per head", f"table 7; head: {_OURS}"),
        "calibration examples": Source("drawn with `data_seed`", f"table 7; the draw: {_OURS}"),
        "training prompts": Source("`--preset paper`: 7,473, 464 and 2,000", "table 7; 500 is this project's default"),
        "order of examples": Source("drawn with `data_seed`", _OURS),
        "self-generation": Source("what is not set here, the model's generation config decides", f"Eq. 13; {_OURS}"),
        "training text": Source("the sampled ids of prompt and completion, whole", f"Eq. 14; {_OURS}"),
        "optimiser": Source("AdamW, cosine", f"A.3, table 7; batch size and warm-up: {_OURS}"),
        "what is trained": Source("", "A.3, table 7"),
        "precision": Source("bfloat16 where the hardware has it", _OURS),
        "scores": Source("the task's own rules and token limits: [tasks](tasks.md)", _OURS),
        "test items": Source("`--preset paper`: 257 of MBPP, 200 of MMLU, 300 of BBH", "tables 7 and 8"),
        "seeds": Source("", "A.3"),
        "methods of a study": Source("", "section 4.1; `spd-random` is this project's control"),
    },
)

_REFERENCE_TASK: dict[str, Any] = {"prompt_template": "reference", "order": "file", "scoring": "reference"}

REFERENCE = Protocol(
    name="reference",
    says="the reference code, github.com/gh540-svg/hahaha, commit e249fec, to the letter",
    settings={
        "prompt_format": "verbatim", "span_rule": "inside",
        "layers": "last_mid_from_0", "center_gradients": True, "per_head": False, "rank": 0.5,
        "max_calibration_tokens": 256, "too_long": "drop",
        "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 256, "max_prompt_tokens": 384,
        "retokenise": True, "max_length": 256, "loss_on_padding": True,
        "train_batch_size": 4, "lr": 1e-5, "weight_decay": 0.01, "warmup_epochs": 0.5, "epochs": 5, "early_stop": True,
        "method": "lora", "lora_rank": 8, "lora_alpha": 8, "lora_dropout": 0.05,
        "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "seed": 42,
    },
    task_options={
        "gsm8k": {**_REFERENCE_TASK, "max_new_tokens": 256},
        "svamp": {**_REFERENCE_TASK, "max_new_tokens": 256},
        "mbpp": {**_REFERENCE_TASK, "max_new_tokens": 512},
        "codealpaca": {**_REFERENCE_TASK, "max_new_tokens": 256},
        # the training side of a target is not read: see `source_options`
        "mmlu": {**_REFERENCE_TASK, "max_new_tokens": 5, "train_source": "dev+val"},
        "bbh": {
            **_REFERENCE_TASK, "max_new_tokens": 16,
            "subtasks": [
                "logical_deduction_three_objects", "date_understanding", "movie_recommendation",
                "boolean_expressions", "causal_judgement", "sports_understanding",
            ],
        },
    },
    # on the hub only
    source_options={"mmlu": {"train_source": "auxiliary"}},
    sizes={
        "gsm8k": {"n_calibration": 50, "n_train": 7473, "n_eval": 100},
        "svamp": {"n_eval": 100},
        "mbpp": {"n_calibration": 50, "n_train": 464, "n_eval": 257},
        "codealpaca": {"n_eval": 100},
        "mmlu": {"n_calibration": 50, "n_train": 2000, "n_eval": 200},
        "bbh": {"n_eval": 300},
    },
    methods=("base", "psr-reference", "ssd-reference", "spd", "spd-random"),
    sources={
        "prompts": Source("raw text, also for instruct models; the texts are in [tasks](tasks.md)", _CODE),
        "tokens that count as correctness": Source(
            "tokens wholly inside a span, of a text cut at 256 tokens; an example that has none left is left out here",
            f"{_CODE}; what it does with such an example is not known",
        ),
        "target layers": Source("blocks `[n - 1, n // 2]` counted from 0: 23 and 12 of 24", _CODE),
        "centring of the gradients": Source("over all rows of all examples", _CODE),
        "projector": Source("one over all KV heads, of rank `kv_dim // 2`", _CODE),
        "calibration examples": Source(
            "the first ones; they are training prompts, too. A script of the repository takes 500 of MMLU", _CODE
        ),
        "training prompts": Source("of MBPP those of training and validation", _CODE),
        "order of examples": Source("MMLU shuffled with seed 42", _CODE),
        "self-generation": Source("left padding, batches of 8, one sample", _CODE),
        "training text": Source("decoded, tokenised again, cut and padded to 256; padding is in the labels", _CODE),
        "optimiser": Source("AdamW, cosine over all epochs, clip 1; the best epoch's weights come back", _CODE),
        "what is trained": Source("", _CODE),
        "precision": Source(
            "the reference code: float16 throughout. Not set here: `--dtype float16` comes nearest", _CODE
        ),
        "scores": Source(
            "greedy; the *last* number of a completion, the first letter, the first code block",
            f"{_CODE}; token limit of CodeAlpaca: {_OURS}",
        ),
        "test items": Source("the first ones; 50 of each of BBH's six subtasks; the last 100 of CodeAlpaca", _CODE),
        "seeds": Source("one", _CODE),
        "methods of a study": Source(
            "self-retraining at top-p 1.0 without early stop; \"SSD\" is the same sampling without a projection",
            f"{_CODE}; `spd-random` is this project's control",
        ),
    },
)  # fmt: skip

APPLE_SSD = Protocol(
    name="apple-ssd",
    says="simple self-distillation (arXiv 2604.01193): own outputs at high temperature, no projection",
    settings={
        "temperature": 1.6, "top_p": 0.8, "top_k": 20,
        "strength": 0.0,
        "method": "full", "lr": 5e-6, "train_batch_size": 32,
    },
    methods=("base", "ssd"),
    sources={
        "prompts": Source("", _NONE),
        "tokens that count as correctness": Source("", _NONE),
        "target layers": Source("", _NONE),
        "centring of the gradients": Source("", _NONE),
        "projector": Source("none: strength 0", "arXiv 2604.01193: raw outputs of the model as it is"),
        "calibration examples": Source("", _NONE),
        "training prompts": Source(
            "there: 10,000 problems of rStar-Coder, one sample each", f"{_ACCOUNT}; the number here: {_NONE}"
        ),
        "order of examples": Source("", _NONE),
        "self-generation": Source("there: completions of up to 65,536 tokens", f"{_CARDS}; token limit: {_NONE}"),
        "training text": Source("", _NONE),
        "optimiser": Source("AdamW, cosine", f"{_ACCOUNT}; the others: {_NONE}"),
        "what is trained": Source(
            "all weights", "the published checkpoints are whole models, and no account mentions an adapter"
        ),
        "precision": Source("", _NONE),
        "scores": Source("greedy here; there sampled at temperature 0.9 or 1.1, by model", _CARDS),
        "test items": Source("there: LiveCodeBench, which is no task here", _NONE),
        "seeds": Source("", _NONE),
        "methods of a study": Source("", "arXiv 2604.01193"),
    },
)  # fmt: skip

PROTOCOLS = {found.name: found for found in (PAPER, REFERENCE, APPLE_SSD)}
"""The protocols by name; `paper` is the default."""
