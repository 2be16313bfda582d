"""Write the tables of docs/scaling.md: what plans say of large models, and `scaling.json` and `curves.json` in
`benchmarks/results/`.

    python -m benchmarks.scaling_table

Each `<!-- NAME -->` ... `<!-- end of NAME -->` in the page becomes the table `NAME` of `TABLES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

from spd_lens.output import markdown
from spd_lens.sites import resolve_sites
from spd_lens.study import A100, Shape, StudyConfig, duration, make_plan, read_shape
from spd_lens.subspaces import moments_size

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results"
MODELS = (
    "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen2.5-7B-Instruct",
    "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-14B-Instruct", "meta-llama/Llama-3.1-70B-Instruct",
    "Qwen/Qwen3-235B-A22B-Instruct-2507", "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
)  # fmt: skip
"""The paper's five backbones, a dense model of 70 billion weights, and two mixtures of experts."""
N_PROMPTS, N_GPUS = 1_000_000, 512
STAGES = ("extract", "generate", "finetune")


def config_of(model: str) -> StudyConfig:
    """SPD on GSM8K at the paper's settings, with a million training prompts and one epoch."""
    return StudyConfig.make(
        {
            "methods": ["spd"], "sources": ["gsm8k"], "n_side_effects": 0,
            "settings": {
                "model": model, "dtype": "bfloat16", "device": "cuda", "engine": "twin", "n_train": N_PROMPTS,
                "max_new_tokens": 320, "generation_batch_size": 128, "epochs": 1,
            },
        }
    )  # fmt: skip


@cache
def shape_of_model(model: str) -> Shape:
    """The shape of one of the models, which takes a second to count."""
    return read_shape(model)


def costs() -> list[str]:
    """A line for each model and stage."""
    lines = []
    for model in MODELS:
        shape = shape_of_model(model)
        plan = make_plan(config_of(model), shape, A100)
        for row in plan.rows:
            if row.stage in STAGES:
                cost, first = row.cost, row.stage == STAGES[0]
                lines.append([
                    _named(shape) if first else "", plan.devices if first else "", row.stage,
                    _digits(cost.flops / 1e15), _digits(cost.moved / 1e12), duration(cost.seconds),
                    duration(cost.seconds * plan.devices / N_GPUS), f"{cost.memory / 1e9:.0f}",
                    _digits(cost.host / 1e9),
                ])  # fmt: skip
    head = [
        "model", "GPUs that hold it", "stage", "PFLOP", "TB moved", "time, one copy", f"time, {N_GPUS} GPUs",
        "GB on each GPU", "GB of main memory",
    ]  # fmt: skip
    return markdown(head, lines, "---:")


def _digits(value: float) -> str:
    """Three digits, whole numbers from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _named(shape: Shape) -> str:
    active = f", {shape.n_active / 1e9:.0f} for a token" if shape.n_routed else ""
    return f"{shape.model.rpartition('/')[2]} ({shape.n_params / 1e9:.3g} billion weights{active})"


def moments() -> list[str]:
    """What the moments of K and V of a model take: at the paper's layers, and at all of them."""
    sizes = [
        (shape.model.rpartition("/")[2], shape.n_layers, shape.n_kv_heads, shape.d_head)
        for shape in map(shape_of_model, MODELS)
    ]
    lines = []
    for name, n_layers, n_heads, d_head in [*sizes, ("100 layers of 8 KV heads of 128", 100, 8, 128)]:
        cells = []
        for layers, n_shards, across in (("last_mid", 8, True), ("all", 8, True), ("all", 8, False), ("all", 1, False)):
            sites = resolve_sites(layers, ("k", "v"), n_layers)
            size = moments_size([(n_heads, d_head)] * len(sites), n_shards, across_heads=across)
            cells.append(f"{size / 1e9:.2g} GB")
        lines.append([name, f"{n_heads * d_head:,}", *cells])
    head = [
        "model", "width", "two layers", "all layers", "all layers, `across_heads=False`", "and `shards=1`",
    ]  # fmt: skip
    return markdown(head, lines, "---:")


def measured() -> list[str]:
    """What was measured beside what was foreseen."""
    record = json.loads((RESULTS / "scaling.json").read_text(encoding="utf-8"))
    lines = [
        [row["model"], row["what"], row["peer"], row["ours"], f"{row['value'] - 1:+.0%}", row["note"]]
        for row in record["rows"]
    ]
    head = ["model", "what", "foreseen", "measured", "error", "besides"]
    return markdown(head, lines)


def curves() -> list[str]:
    """The exponents of time and of peak memory, measured and expected, for each stage and for what grows."""
    record = json.loads((RESULTS / "curves.json").read_text(encoding="utf-8"))
    lines = []
    for row in record["rows"]:
        stage, _, axis = row["what"].partition(": time by ")
        if axis:
            lines.append([axis, stage])
        lines[-1] += [f"{round(row['value'], 2) + 0:.2f}", row["peer"]]  # a row of memory is behind that of time
    head = ["what grows", "stage", "time", "expected", "peak memory", "expected"]
    return markdown(head, lines)


TABLES: dict[str, Callable[[], list[str]]] = {
    "costs": costs, "moments": moments, "measured": measured, "curves": curves,
}  # fmt: skip


def written(text: str) -> str:
    """The page with all of its tables as they are now."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if begin in text:
            head, rest = text.split(begin)
            rows = "\n".join(table())
            text = f"{head}{begin}{rows}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    """All tables of the page."""
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
