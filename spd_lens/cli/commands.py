"""`spd-lens`: the whole job, or its stages alone."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markdown import Markdown

from spd_lens.cli.artefacts import COMMANDS
from spd_lens.cli.examples import epilog
from spd_lens.cli.flags import AdapterDir, AsJson, Out, Quiet, SubspaceFile, print_json, with_settings
from spd_lens.errors import SPDError
from spd_lens.files import check_writable
from spd_lens.output import Console, log_to, set_up_logging, start
from spd_lens.runs import Size, SPDConfig, validated
from spd_lens.settings import DEFAULT_MODEL, EngineSettings, Extraction

if TYPE_CHECKING:
    from spd_lens.subspaces import Policy

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

SizeOption = Annotated[
    Size | None, typer.Option("--size", help="By default the largest that this machine makes in a few minutes.")
]
_RESUMABLE = ("run", "demo", "rounds", "study", "generate", "finetune")
_FORMAT = ("prompt_format", "add_special_tokens", "span_rule", "system", "enable_thinking", "prompt_date")
_MODEL = ("protocol", "model", "backend", "dtype", "device", "device_map", "offload_folder", *_FORMAT)
_DATA = ("task", "data_dir", "task_options", "data_seed", "too_long")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(importlib.metadata.version("spd_lens"))
        raise typer.Exit


@app.callback()
def with_log(
    log_file: Annotated[
        Path | None, typer.Option("--log-file", help="Also write the log to this file; stands before the command.")
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", callback=_version)] = False,
) -> None:
    """Self-Policy Distillation (arXiv 2605.22675): find, look at, apply and distil a capability subspace."""
    if log_file is not None:
        log_to(log_file)


def main() -> None:
    """Entry point: a user's mistake is one sentence on stderr and exit code 2."""
    start(app, on_interrupt=_after_interrupt(sys.argv[1:]))


@app.command("run")
@with_settings()
def run_command(
    config: SPDConfig,
    out: Out = Path("runs/spd"),
    show_config: Annotated[bool, typer.Option("--show-config", help="Print all settings and stop.")] = False,
    quiet: Quiet = False,
) -> None:
    """Calibrate, generate, fine-tune and evaluate. Started again, it continues."""
    if show_config:
        sys.stdout.write(config.to_yaml(ascii=not Console().encoding.startswith("utf")))
        return
    set_up_logging(quiet)
    _run(config, out, quiet)


@app.command("demo")
def demo(out: Out = Path("runs/demo"), size: SizeOption = None, quiet: Quiet = False) -> None:
    """The whole job on SmolLM2-135M-Instruct and synthetic word problems, in a few minutes on two cores."""
    set_up_logging(quiet)
    from spd_lens.study import begin_demo

    _run(begin_demo(out, size), out, quiet)


@app.command("study")
def study_command(
    file: Annotated[Path | None, typer.Argument(help="YAML file: methods, sources, targets, seeds, settings.")] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="A ready-made study; settings of the file replace its own.")
    ] = None,
    size: SizeOption = None,
    out: Out = Path("runs/study"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan with its costs, and do nothing.")] = False,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="As --set settings.protocol=NAME: paper, reference or apple-ssd.")
    ] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, over file and preset.")] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", help="Make it on the Ray cluster at this address; local starts one here.")
    ] = None,
    submitit: Annotated[
        str | None, typer.Option("--submitit", help="Make it by jobs of slurm, or by processes here: local.")
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", help="Directory or URL through which workers pass on what they make.")
    ] = None,
    worker: Annotated[
        list[str] | None, typer.Option("--worker", help="KEY=VALUE: what Ray or submitit gives each worker.")
    ] = None,
    at_once: Annotated[
        int | None, typer.Option("--at-once", min=1, help="Most parts at work; else what the cluster takes (local: 2).")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Methods x sources x targets x seeds on one model, with a report. Started again, it continues."""
    set_up_logging(quiet)
    from spd_lens.study import study, workers_of

    settings = [*(setting or []), *([] if protocol is None else [f"settings.protocol={protocol}"])]
    workers = workers_of(ray, submitit, worker or [])
    few = 2 if "local" in (ray, submitit) else None
    study(
        file, preset, out, settings, dry_run=dry_run, console=Console(), workers=workers, store=store,
        at_once=at_once or few, size=size,
    )  # fmt: skip


@app.command("rounds")
@with_settings()
def rounds_command(
    config: SPDConfig,
    out: Out = Path("runs/rounds"),
    n_rounds: Annotated[int, typer.Option("--rounds", min=1, help="Number of rounds at most.")] = 3,
    reextract: Annotated[str, typer.Option(help="Use the subspace of the current model, or of the first.")] = "current",
    kl_budget: Annotated[
        float, typer.Option("--kl-budget", help="Stop when KL from the first model exceeds this; 0 for no limit.")
    ] = 1.0,
    stop_on_loss: Annotated[
        bool, typer.Option("--stop-on-loss/--no-stop-on-loss", help="Stop when the held-out loss rises beyond noise.")
    ] = True,
    n_held_out: Annotated[int, typer.Option("--n-held-out", min=2, help="Test items for drift and stop rule.")] = 64,
    quiet: Quiet = False,
) -> None:
    """SPD again on what SPD made, in float32. Started again, it continues."""
    set_up_logging(quiet)
    from spd_lens.runs import StopRule, run_rounds, say

    rule = StopRule(stop_on_loss, kl_budget or None)
    done = run_rounds(
        config, out, n_rounds, reextract=reextract, stop=rule, n_held_out=n_held_out, progress=not quiet
    )  # fmt: skip
    Console().print(say(done.table, done.notes.get("stopped")), highlight=False, markup=False)
    Console().print(f"Everything is in {out}.", highlight=False, markup=False)


@app.command("extract")
@with_settings(
    *_MODEL, *_DATA, "n_calibration", "span", "layers", "kinds", "estimator", "rank", "energy", "per_head", "center",
    "center_gradients", "loss", "engine", "max_calibration_tokens", "across_heads", "seed", "allow_code_execution",
    "strict",
)  # fmt: skip
def extract_command(
    config: SPDConfig,
    out: Out = Path("runs/extract"),
    keep: Annotated[
        str | None, typer.Option("--keep", help="For other estimators later: classes (of positions), cross (products).")
    ] = None,
    sinks: Annotated[
        str | None, typer.Option("--sinks", help="The sink among the classes: first (token), or attended (most).")
    ] = None,
    labels: Annotated[
        str | None, typer.Option("--labels", help="Gradients towards gold answers, or towards sampled ones.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Gradient moments and subspace of a task's calibration examples, into a directory.

    Under torchrun or accelerate launch its processes share the work.
    """
    from spd_lens.models import launched

    with launched() as everyone:
        set_up_logging(quiet, errors_only=not everyone.is_main)
        from spd_lens import estimators
        from spd_lens.runs import Experiment, check_halves, check_stage

        check_writable(out, directory=True)
        flags = {"keep": keep, "sinks": sinks, "labels": labels}
        needs = estimators.get(config.estimator).needs
        how = validated(Extraction, {**needs, **{name: value for name, value in flags.items() if value is not None}})
        shown = everyone.is_main and not quiet
        experiment = Experiment(config, out, progress=shown, keep=how.keep)
        check_stage(experiment, "calibration", config.n_calibration)
        moments = experiment.extract(sinks=how.sinks, labels=how.labels)
        beside = estimators.Calibration(experiment.pair, experiment.calibration, config.seed, config.extraction, shown)
        subspace = replace(experiment.subspace(moments, others=beside), provenance=experiment.provenance())
        check_halves(moments, subspace)
        if everyone.is_main:
            moments.save(out / "moments.safetensors")
            subspace.save(out / "subspace.safetensors")
            Console().print(f"{moments}\n{subspace}\nwritten to {out}", highlight=False, markup=False)


@app.command("generate")
@with_settings(
    *_MODEL, *_DATA, "n_train", "strength", "max_new_tokens", "temperature", "top_p", "top_k", "generation_batch_size",
    "max_prompt_tokens", *EngineSettings.model_fields, "seed", "strict",
)  # fmt: skip
def generate_command(
    config: SPDConfig,
    out: Out = Path("corpus.jsonl"),
    subspace: SubspaceFile = None,
    adapter: AdapterDir = None,
    quiet: Quiet = False,
) -> None:
    """Completions of a task's training prompts, into a JSONL file. Started again, it continues."""
    set_up_logging(quiet)
    from spd_lens.runs import Experiment, check_stage

    policy = _policy(config, subspace, adapter)
    experiment = Experiment(config, out.parent, progress=not quiet)
    check_stage(experiment, "train", config.n_train)
    corpus = experiment.generate(out, policy)
    Console().print(f"{corpus}", highlight=False, markup=False)


@app.command("finetune")
@with_settings(
    *_MODEL, "method", "epochs", "lr", "weight_decay", "train_batch_size", "lora_rank", "lora_alpha", "lora_dropout",
    "lora_targets", "loss_on", "warmup_epochs", "early_stop", "retokenise", "max_length", "loss_on_padding", "seed",
    "report_to", "strict",
)  # fmt: skip
def finetune_command(
    config: SPDConfig,
    corpus: Annotated[Path, typer.Option("--corpus", help="JSONL file that `generate` wrote.")],
    out: Out = Path("adapter"),
    parallel: Annotated[
        bool, typer.Option("--parallel", help="Train with the other processes of accelerate launch or torchrun.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune on a corpus (Eq. 14); writes a PEFT adapter directory."""
    speaks = not parallel or os.environ.get("RANK", "0") == "0"
    set_up_logging(quiet or not speaks)
    from spd_lens.generation import Corpus
    from spd_lens.models import fails_first, own_device
    from spd_lens.runs import Experiment, check_settings

    if parallel:
        config = config.model_copy(update={"device": own_device(config.device)})
    try:
        check_settings(config)
        experiment = Experiment(config, out.parent, progress=not quiet)
        path = experiment.finetune(Corpus.load(corpus), out, parallel=parallel)
    except SPDError:
        if parallel and not fails_first():  # another process says it
            raise typer.Exit(2) from None
        raise
    if speaks:
        Console().print(f"written to {path}", highlight=False, markup=False)


@app.command("evaluate")
@with_settings(*_MODEL, *_DATA, "n_eval", "strength", "generation_batch_size", "allow_code_execution")
def evaluate_command(
    config: SPDConfig,
    out: Out = Path("eval.json"),
    subspace: SubspaceFile = None,
    adapter: AdapterDir = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Token limit of an answer; else the task's own.")] = None,
    quiet: Quiet = False,
) -> None:
    """Score the base, projected or fine-tuned model on a task's test items."""
    set_up_logging(quiet)
    from spd_lens.runs import Experiment, check_stage, make_tasks

    check_writable(out)
    policy = _policy(config, subspace, adapter)
    own = config.model_copy(update={"eval_tasks": [config.task]})
    tasks = make_tasks(own, trains=False)
    experiment = Experiment(own, out.parent, tasks=tasks, progress=not quiet, answer_tokens=max_new_tokens)
    n = config.n_test(config.task)
    check_stage(experiment, "test", n)
    result = experiment.score(next(iter(experiment.targets)), policy, out, n=n)
    Console().print(f"{result}\nwritten to {out}", highlight=False, markup=False)


@app.command("spans")
@with_settings("protocol", "data_dir", "task_options", "model", *_FORMAT, "loss", "data_seed", "allow_code_execution")
def spans_command(
    config: SPDConfig,
    task: Annotated[str, typer.Argument(help="A task's name, or a .jsonl file of your own.")],
    split: Annotated[str, typer.Option("--split", help="calibration, train or test.")] = "calibration",
    span: Annotated[
        str | None, typer.Option("--span", help="What decides correctness: the task's option span.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="Examples to audit; by default 20, or all there are.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a standalone page.")] = None,
    show: Annotated[int, typer.Option("--show", help="Examples printed token by token.")] = 3,
) -> None:
    """Which tokens of a task's examples count as correctness, and what looks wrong with them."""
    set_up_logging(quiet=True)
    from spd_lens.spans import show_spans

    if html is not None:
        check_writable(html)
    show_spans(config, task, split, n, html, show, Console(), span)


@app.command("compare")
def compare_command(
    first: Annotated[str, typer.Argument(help="A run directory, or several with commas between (other seeds).")],
    second: Annotated[str, typer.Argument(help="What to compare with it.")],
    out: Annotated[Path | None, typer.Option("--out", help="Also write the table here, as Markdown.")] = None,
    as_json: AsJson = False,
) -> None:
    """Two runs on the same test items: paired differences with intervals and exact tests."""
    from spd_lens.files import write_text
    from spd_lens.runs import Run, compare, comparison_table

    if out is not None:
        check_writable(out)
    runs = [[Run.open(path.strip()) for path in side.split(",")] for side in (first, second)]
    found = compare(*runs)
    table = comparison_table(found, first, second)
    if out is not None:
        write_text(out, table)
    if as_json:
        print_json([{**asdict(one), "verdict": one.verdict} for one in found])
        return
    Console().print(Markdown(table, hyperlinks=False))


@app.command("check")
@with_settings("backend", "dtype", "device", *_FORMAT)
def check_command(
    config: SPDConfig,
    model: Annotated[str, typer.Argument(help="Hub name, model directory or .gguf file.")] = DEFAULT_MODEL,
    as_json: AsJson = False,
    show_tokens: Annotated[str | None, typer.Option(help="Also print the tokens that this prompt becomes.")] = None,
) -> None:
    """Does this model work here, provably: hooks, folding, gradients, padding, cache? Exit code 1 if not."""
    set_up_logging(quiet=True)
    from spd_lens.runs import load_pair, print_report

    pair = load_pair(config.model_copy(update={"model": model}))
    if not print_report(pair, Console(soft_wrap=as_json), as_json=as_json, prompt=show_tokens):
        raise typer.Exit(1)


@app.command(
    "analyze",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def analyze_command(context: typer.Context) -> None:
    """Spectra, overlaps, sweeps and more of run directories: `spd-lens analyze` lists them."""
    # found by name and imported when asked for: the library does not depend on its analyses
    index = importlib.import_module("spd_lens.analysis.index")
    index.analyze(context.args)


@app.command("dashboard")
def dashboard_command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; the first is the one that is shown first.")],
    out: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("dashboard.html"),
    serve: Annotated[bool, typer.Option("--serve", help="A live app on this machine, which generates.")] = False,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port of the live app; 0 takes any that is free.")
    ] = 8050,
    quiet: Quiet = False,
) -> None:
    """Runs as one self-contained page, or as a live app that also generates."""
    set_up_logging(quiet)
    dashboard = importlib.import_module("spd_lens.analysis.dashboard")
    if serve:
        dashboard.serve(runs, port=port)
        return
    check_writable(out)
    written = dashboard.write_dashboard(runs, out)
    Console().print(f"written to {written}", highlight=False, markup=False)


for _name, _function in COMMANDS.items():
    app.command(_name)(_function)
for _command in app.registered_commands:
    _command.epilog = epilog(_command.name)


def _policy(config: SPDConfig, subspace: Path | None, adapter: Path | None) -> Policy:
    from spd_lens.subspaces import Policy, Subspace

    return Policy("", Subspace.load(subspace) if subspace else None, config.strength, adapter)


def _run(config: SPDConfig, out: Path, quiet: bool) -> None:
    from spd_lens.runs import run

    record = run(config, out, progress=not quiet)
    Console().print(Markdown(record.summary, hyperlinks=False))
    Console().print(f"Everything is in {out}.", highlight=False, markup=False)


def _after_interrupt(words: list[str]) -> str:
    command = next((word for word in words if word in {one.name for one in app.registered_commands}), None)
    return "the same command continues where it was" if command in _RESUMABLE else "nothing was written"
