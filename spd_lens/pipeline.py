"""`run`: calibrate, generate, fine-tune and evaluate, each stage kept in the run directory and done once."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spd_lens import tasks
from spd_lens.capture import extract
from spd_lens.config import SPDConfig
from spd_lens.corpus import NOT_APPLIED, Corpus
from spd_lens.decoding import stop_tokens
from spd_lens.digests import weights_digest
from spd_lens.errors import SPDError
from spd_lens.evaluation import EvalResult, Policy, evaluate, teacher_forced
from spd_lens.fitting import Draws, fitted, left_out
from spd_lens.generation import generate
from spd_lens.model_settings import ModelSettings
from spd_lens.models import ModelPair, load
from spd_lens.models.neutral import neutral
from spd_lens.models.parity import Parity
from spd_lens.moments import GradientMoments
from spd_lens.preflight import check_data, check_model, check_settings
from spd_lens.projection import folded, projected
from spd_lens.report import write_summary
from spd_lens.rundir import Folder, Run
from spd_lens.sampling import Sampling
from spd_lens.sandbox.executor import passes_tests
from spd_lens.storage import is_made, read_json, write_json
from spd_lens.subspace import Subspace
from spd_lens.tasks import CodeTask, Task
from spd_lens.training import finetune
from spd_lens.training.place import is_finished

log = logging.getLogger(__name__)


@neutral()
def run(config: SPDConfig, out: str | Path, *, progress: bool = True, pair: ModelPair | None = None) -> Run:
    """The whole of SPD (Algorithm 1), with evaluation of base and SPD on the same items.

    Every stage writes its artefact whole or not at all, and is skipped if the artefact is there: a run that was
    killed and is started again continues and ends with the same result.

    Args:
        config: All settings.
        out: The run directory; new, empty, or of a run with the same settings.
        progress: Show progress bars.
        pair: A pair that is already loaded, instead of `config.model`.

    Raises:
        SPDError: a setting that cannot work (found before anything is written where possible), a directory of another
            run, or a model or data set that is not the one the run was begun with.
    """
    if pair is not None:
        config = config.model_copy(update=decided_by(pair))
    Run(out).check(config)
    source, targets = make_tasks(config)
    check_settings(config)
    check_data(config, source, targets)
    keeps_lens = pair is not None and pair.has_lens
    if pair is None:
        log.info("loading %s", config.model)
        pair = load_pair(config)
    elif keeps_lens:
        pair.check()  # an edited lens model would be measured, and the twin trained
    pair = Run(out).dated(pair)
    source = fitted(source, pair, config)
    targets = {name: fitted(task, pair, config) for name, task in targets.items()}
    check_model(config, pair, source, targets)
    record = Run.open(out, config)
    with record.locked():
        _note(record, config, pair, source, targets)
        subspace = _calibrate(record, pair, source, progress)
        _prove(record, pair, subspace)
        if not keeps_lens:
            pair.drop_lens()  # the stages that follow run on the twin
        _self_generate(record, pair, source, subspace, progress)
        _distil(record, pair, progress)
        for name, task in targets.items():
            _effects(record, pair, name, task, subspace, progress)
        for name, task in targets.items():
            _score(record, pair, name, task, subspace, progress)
        write_summary(record)
    log.info("finished: %s", record.path / "summary.md")
    return record


def load_pair(config: SPDConfig) -> ModelPair:
    """The pair that a config names."""
    return load(
        config.model,
        backend=config.backend,
        dtype=config.dtype,
        device=config.device,
        prompt_format=config.prompt_format,
        system=config.system,
        enable_thinking=config.enable_thinking,
        prompt_date=config.prompt_date,
    )


def decided_by(pair: ModelPair) -> dict[str, Any]:
    """The settings that a pair which is loaded already has decided, whatever a config says."""
    form = pair.format
    day = form.prompt_date if form.date_given else None
    return {"model": pair.name, "system": form.system, "enable_thinking": form.enable_thinking, "prompt_date": day}


def make_tasks(config: SPDConfig) -> tuple[Task, dict[str, Task]]:
    """The source task, and the tasks to evaluate on by the names that their results are kept under."""
    source = tasks.configured(config.task, config.data_dir, config.task_options)
    targets = {
        key: source if name == config.task else tasks.get(name, config.data_dir) for key, name in config.targets.items()
    }
    if config.allow_code_execution:
        for task in {id(task): task for task in (source, *targets.values())}.values():
            if isinstance(task, CodeTask):
                task.executor = passes_tests
    return source, targets


def _note(record: Run, config: SPDConfig, pair: ModelPair, source: Task, targets: dict[str, Task]) -> None:
    """Model, data, set-up and machine of the run; refused where an earlier start saw something else."""
    record.note_once("the model", fingerprint=pair.fingerprint.to_dict(), weights=weights_digest(pair.hf))
    record.note_once("the data of the source task", data=source.sources())
    held_out = {name: task.sources() for name, task in targets.items()}
    record.note_once("the data of the evaluation", eval_data=held_out)
    note_set_up(record, config, pair)
    draws: Draws = {
        "calibration": {config.task: (source, config.n_calibration)},
        "train": {config.task: (source, config.n_train)},
        "test": {name: (task, config.n_test(name)) for name, task in targets.items()},
    }
    if counts := left_out(pair, config, draws):
        record.note_once("the choice of texts that fit", left_out=counts)
    record.note_environment()
    cards = {config.task: source.card(), **{name: task.card() for name, task in targets.items()}}
    write_json(record.path / "data_card.json", cards)


def note_set_up(folder: Folder, config: SPDConfig, pair: ModelPair) -> None:
    """What the settings were resolved to; refused where an earlier start resolved them otherwise."""
    sampling = Sampling.resolve(pair, config.temperature, config.top_p, config.top_k)
    own = ModelSettings.of(pair, sampling, stop_tokens(pair)).settings
    if NOT_APPLIED in own:
        folder.note(**{NOT_APPLIED: own.pop(NOT_APPLIED)})
    resolved = {
        "dtype": str(pair.dtype).removeprefix("torch."),
        "device": str(pair.device),
        "backend": pair.backend,
        "sampling": sampling.to_dict(),
        "format": pair.format.name,
        **own,
    }
    folder.note_once("the set-up", resolved=resolved)
    folder.note_date(pair)


def _calibrate(record: Run, pair: ModelPair, source: Task, progress: bool) -> Subspace:
    config = record.config
    if not is_made(record.path / "moments.safetensors", GradientMoments.load):
        examples = source.calibration(config.n_calibration, config.data_seed)
        log.info("extracting gradients of %d calibration examples", len(examples))
        with record.stage("extract"):
            moments = extract(
                pair,
                examples,
                layers=config.layers,
                kinds=config.kinds,
                loss=config.loss,
                engine=config.engine,
                progress=progress,
            )
            moments.save(record.path / "moments.safetensors")
    if not is_made(record.path / "subspace.safetensors", Subspace.load):
        with record.stage("extract"):
            subspace = record.moments.subspace(config.rank, per_head=config.per_head, center=config.center)
            subspace.save(record.path / "subspace.safetensors")
    return record.subspace


def _prove(record: Run, pair: ModelPair, subspace: Subspace) -> None:
    """Hooks and folded weights do the same: the lens model under hooks against the folded twin, firings counted."""
    # without the lens engine no lens model is built, and of some models there is none
    if "hooks" in record.notes or record.config.engine == "twin" or pair.backend == "none":
        return
    with record.stage("extract"):
        with projected(pair.lens, subspace, record.config.strength) as projection:
            hooked = pair.check_logits(pair.lens)
        with folded(pair.hf, subspace, record.config.strength):
            parity = Parity.between(pair.check_logits(pair.hf), hooked)
        if not parity.within(pair.dtype):
            raise SPDError(
                f"hooks and folded weights disagree for {pair.name} (logits by {parity.logits:.2g} of their spread); "
                "use dtype='float32' or another backend"
            )
        firings = {str(site): n for site, n in projection.firings.items()}
        record.note(hooks={"firings": firings, "fold_parity": asdict(parity)})


def _self_generate(record: Run, pair: ModelPair, source: Task, subspace: Subspace, progress: bool) -> None:
    config = record.config
    prompts = source.train(config.n_train, config.data_seed)
    settings: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "seed": config.seed,
        "batch_size": config.generation_batch_size,
        "progress": progress,
    }
    if not Corpus.is_finished(record.path / "corpus.jsonl"):
        log.info("generating %d completions under the projection", len(prompts))
        with record.stage("generate"):
            generate(
                pair, prompts, subspace=subspace, strength=config.strength,
                path=record.path / "corpus.jsonl", **settings,
            )  # fmt: skip
    # the same prompts with the same noise: what differs, the projection changed
    compared = prompts[: config.n_compared]
    if not Corpus.is_finished(record.path / "unprojected.jsonl"):
        log.info("generating %d of them without the projection, to compare", len(compared))
        with record.stage("compare"):
            generate(pair, compared, path=record.path / "unprojected.jsonl", **settings)


def _distil(record: Run, pair: ModelPair, progress: bool) -> None:
    config = record.config
    if is_finished(record.path / "adapter"):
        return
    corpus = record.corpus
    log.info("fine-tuning on %d completions, %d epochs", len(corpus), config.epochs)
    with record.stage("finetune"):
        finetune_with(config, pair, corpus, record.path / "adapter", progress=progress)


def finetune_with(config: SPDConfig, pair: ModelPair, corpus: Corpus, out: Path, *, progress: bool = True) -> Path:
    """`finetune` with a config's settings."""
    return finetune(
        pair,
        corpus,
        out=out,
        method=config.method,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=config.lora_targets,
        lr=config.lr,
        weight_decay=config.weight_decay,
        epochs=config.epochs,
        batch_size=config.train_batch_size,
        loss_on=config.loss_on,
        seed=config.seed,
        progress=progress,
    )


def _effects(record: Run, pair: ModelPair, name: str, task: Task, subspace: Subspace, progress: bool) -> None:
    """Teacher-forced: base, projection, fine-tuned, and random subspaces of the same ranks as the control."""
    config = record.config
    path = record.path / "effects" / f"{name}.json"
    items = [item for item in task.test(config.n_test(name), config.data_seed) if item.spans]
    if not items or is_made(path, read_json):
        return
    log.info("measuring aligned loss and KL on %d held-out solutions of %s", len(items), name)
    random = [subspace.random_like(config.seed + i) for i in range(config.n_random)]
    policies = [
        Policy("base"),
        Policy("projected", subspace, config.strength),
        Policy("spd", adapter=record.adapter),
        *(Policy(f"random-{i}", control, config.strength) for i, control in enumerate(random)),
    ]
    with record.stage("effects"):
        found = teacher_forced(pair, items, policies, progress=progress)
        write_json(path, {name: [asdict(item) for item in rows] for name, rows in found.items()})


def _score(record: Run, pair: ModelPair, name: str, task: Task, subspace: Subspace, progress: bool) -> None:
    config = record.config
    chosen: dict[str, dict[str, Any]] = {
        "base": {},
        "projected": {"subspace": subspace, "strength": config.strength},
        "spd": {"adapter": record.adapter},
    }
    measured = (record.path / "effects" / f"{name}.json").exists()
    n_items = len(task.test(config.n_test(name), config.data_seed))
    for policy in config.policies:
        path = record.path / "eval" / name / f"{policy}.json"
        if is_made(path, EvalResult.load):
            continue
        log.info("scoring %s on %d items of %s", policy, n_items, name)
        with record.stage("evaluate"):
            result = evaluate(
                pair, task, config.n_test(name), seed=config.data_seed, name=policy,
                batch_size=config.generation_batch_size, path=path.with_suffix(".jsonl"), progress=progress,
                forced=record.effects(name)[policy] if measured else None, **chosen[policy],
            )  # fmt: skip
            result.save(path)
