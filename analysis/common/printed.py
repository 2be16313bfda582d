"""The numbers that the paper prints (arXiv 2605.22675v1), table by table, as printed.

Accuracies are percent, CodeAlpaca is negative log-likelihood. Of figure 4 only ranges are printed, in section 5.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from spd_lens.study import BACKBONES

ABLATED = "Qwen2.5-0.5B-Instruct"
"""The backbone of tables 2 to 5 and figure 4."""
CODE_MATH_QA = ("mbpp", "codealpaca", "gsm8k", "svamp", "mmlu", "bbh")
QA_MATH_CODE = ("mmlu", "bbh", "gsm8k", "svamp", "mbpp", "codealpaca")
LABELS = {
    "mbpp": "MBPP", "codealpaca": "CodeAlpaca", "gsm8k": "GSM8K", "svamp": "SVAMP", "mmlu": "MMLU", "bbh": "BBH",
}  # fmt: skip
LOSSES = ("codealpaca",)
"""Datasets measured by loss, where lower is better."""
SOURCE_OF = {"mbpp": "mbpp", "codealpaca": "mbpp", "gsm8k": "gsm8k", "svamp": "gsm8k", "mmlu": "mmlu", "bbh": "mmlu"}
"""The source task of each column, in every table but the second, whose source is MMLU throughout."""

Numbers = tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class Row:
    """One row of one block of a table."""

    backbone: str
    label: str
    """Name of the method, as printed."""
    method: str
    """Our name of the method."""
    values: Numbers
    phase: str = "trained"
    """`trained`, or `projected`: before training, under the projection."""


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    source: str | None = None
    """The one source of all columns; None if each column has that of its own domain."""


_TABLE_1: dict[str, tuple[Numbers, Numbers, Numbers, Numbers]] = {
    "Qwen2.5-0.5B-Instruct": (
        (17.0, 0.683, 11.0, 16.0, 46.0, 32.7),
        (29.0, 0.683, 17.0, 19.0, 43.0, 33.7),
        (18.3, 0.682, 12.0, 16.0, 48.0, 36.0),
        (25.5, 0.679, 22.0, 32.0, 49.0, 38.7),
    ),
    "Qwen2.5-7B-Instruct": (
        (59.9, 0.653, 49.0, 72.0, 65.0, 47.3),
        (38.9, 0.603, 47.0, 69.0, 72.0, 48.3),
        (57.2, 0.608, 28.0, 68.0, 67.5, 50.0),
        (68.5, 0.597, 50.0, 80.0, 68.5, 50.3),
    ),
    "Qwen2.5-14B-Instruct": (
        (70.8, 0.737, 57.0, 77.0, 72.5, 54.0),
        (67.8, 0.692, 55.0, 82.0, 72.5, 55.3),
        (68.5, 0.688, 48.0, 78.0, 73.5, 54.0),
        (72.4, 0.687, 58.0, 84.0, 74.0, 54.7),
    ),
    "Qwen3-4B-Instruct": (
        (65.4, 0.809, 30.0, 18.0, 63.0, 49.0),
        (63.4, 0.752, 29.0, 12.0, 61.0, 48.7),
        (63.4, 0.754, 31.0, 16.0, 64.0, 48.0),
        (67.7, 0.745, 33.0, 19.0, 65.5, 49.3),
    ),
    "Llama-3.1-8B-Instruct": (
        (29.6, 0.751, 39.0, 57.0, 60.0, 59.0),
        (38.0, 0.786, 26.0, 52.0, 62.0, 56.7),
        (26.5, 0.729, 32.0, 47.0, 60.5, 56.7),
        (37.7, 0.692, 40.0, 56.7, 62.5, 57.3),
    ),
}
STAND_FOR = {"psr": ("psr-reference", "psr"), "ssd": ("ssd-reference", "ssd")}
"""Our methods that may stand beside a row of the paper; the first one that a study has does. What the reference code
calls so comes first, and then the published method of that name. Other rows have one method."""
_METHODS = (("Base model", "base"), ("PSR", "psr"), ("SSD", "ssd"), ("SPD", "spd"))

TABLES = {
    1: PaperTable(
        "Domain-specific and in-domain generalization results under different backbone models",
        CODE_MATH_QA,
        tuple(
            Row(backbone, label, method, values)
            for backbone in BACKBONES
            for (label, method), values in zip(_METHODS, _TABLE_1[backbone], strict=True)
        ),
    ),
    2: PaperTable(
        "Out-of-domain generalization from QA-calibrated self-policy distillation",
        QA_MATH_CODE,
        (
            Row(ABLATED, "Base model", "base", (46.0, 32.7, 11.0, 16.0, 17.0, 0.683)),
            Row(ABLATED, "SSD-QA", "ssd", (48.0, 36.0, 19.0, 14.0, 12.0, 0.676)),
            Row(ABLATED, "SPD-QA", "spd", (49.0, 38.7, 26.0, 17.0, 21.0, 0.680)),
        ),
        source="mmlu",
    ),
    3: PaperTable(
        "Quality of self-generated data before self-distillation training",
        CODE_MATH_QA,
        (
            Row(ABLATED, "Base-Generated Data", "base", (17.0, 0.683, 11.0, 16.0, 46.0, 32.7)),
            Row(ABLATED, "SSD-Generated Data", "ssd", (15.0, 0.683, 10.0, 14.0, 46.5, 28.7), "projected"),
            Row(ABLATED, "SPD-Generated Data", "spd", (16.3, 0.705, 18.0, 14.0, 46.5, 35.3), "projected"),
        ),
    ),
    4: PaperTable(
        "Fine-tuning results on self-generated data from different methods",
        CODE_MATH_QA,
        (
            Row(ABLATED, "PSR", "psr", (29.0, 0.683, 17.0, 19.0, 43.0, 33.7)),
            Row(ABLATED, "SSD", "ssd", (18.3, 0.682, 12.0, 16.0, 48.0, 36.0)),
            Row(ABLATED, "SPD", "spd", (25.5, 0.679, 22.0, 32.0, 49.0, 38.7)),
        ),
    ),
    5: PaperTable(
        "Ablation on loss functions for capability subspace extraction",
        CODE_MATH_QA,
        (
            Row(ABLATED, "Base model", "base", (17.0, 0.683, 11.0, 16.0, 46.0, 32.7)),
            Row(ABLATED, "SPD w/ Full-sequence loss", "spd-full-loss", (11.9, 0.681, 13.0, 24.0, 48.0, 35.7)),
            Row(ABLATED, "SPD w/ Correctness-aligned loss", "spd", (25.5, 0.679, 22.0, 32.0, 49.0, 38.7)),
        ),
    ),
}

FIGURE_4 = {"gsm8k": (19.0, 22.0), "svamp": (26.0, 32.0), "mmlu": (48.0, 50.0), "bbh": (32.0, 37.0)}
"""Range of SPD's accuracy in percent over 20 to 500 calibration examples, as section 5.2 gives it ("around"). Table 4
has 38.7 for BBH at 50 examples, which lies outside."""
FIGURE_4_SIZES = (20, 500)
