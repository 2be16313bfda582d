"""`run`: calibrate, generate, fine-tune and evaluate, each stage kept in the run directory and done once."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from spd_lens.errors import SPDError
from spd_lens.evaluation import EvalResult
from spd_lens.files import is_made, read_json, write_json
from spd_lens.generation import NOT_APPLIED, Corpus, Decoding
from spd_lens.models import ModelPair, Parity, neutral, weights_digest
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.context_limit import left_out
from spd_lens.runs.experiment import Experiment, decided_by, ready_pair
from spd_lens.runs.preflight import check_data, check_model
from spd_lens.runs.run_dir import Folder, Run, write_effects
from spd_lens.runs.summary import write_summary
from spd_lens.subspaces import GradientMoments, Policy, Subspace, folded, projected
from spd_lens.training import is_finished

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
    experiment = Experiment(config, out, progress=progress)
    check_data(experiment)
    keeps_lens = pair is not None and pair.has_lens
    experiment.pair = ready_pair(pair, config, Run(out))
    check_model(experiment)
    record = Run.open(out, config)
    with record.locked():
        _note(record, experiment)
        subspace = _calibrate(record, experiment)
        _prove(record, experiment, subspace)
        if not keeps_lens:
            experiment.pair.drop_lens()  # the stages that follow run on the twin
        steered = Policy("projected", subspace, config.strength)
        _self_generate(record, experiment, steered)
        _distil(record, experiment)
        policies = {p.name: p for p in (Policy("base"), steered, Policy("spd", adapter=record.adapter))}
        for target in experiment.targets:
            _effects(record, experiment, target, policies)
        for target in experiment.targets:
            _score(record, experiment, target, policies)
        write_summary(record)
    log.info("finished: %s", record.path / "summary.md")
    return record


def _note(record: Run, experiment: Experiment) -> None:
    """Model, data, set-up and machine of the run; refused where an earlier start saw something else."""
    config, pair = experiment.config, experiment.pair
    note_model(record, pair)
    record.note_once("the data of the source task", data=experiment.task.sources())
    held_out = {name: task.sources() for name, task in experiment.targets.items()}
    record.note_once("the data of the evaluation", eval_data=held_out)
    note_set_up(record, config, pair)
    if counts := left_out(pair, config, experiment.draws):
        record.note_once("the choice of texts that fit", left_out=counts)
    record.note_environment()
    cards = {config.task: experiment.task.card(), **{name: task.card() for name, task in experiment.targets.items()}}
    write_json(record.path / "data_card.json", cards)


def note_model(folder: Folder, pair: ModelPair) -> None:
    """Which model is worked with; refused where an earlier start saw another."""
    folder.note_once("the model", fingerprint=pair.fingerprint.to_dict(), weights=weights_digest(pair.hf))


def note_set_up(folder: Folder, config: SPDConfig, pair: ModelPair) -> None:
    """What the settings were resolved to; refused where an earlier start resolved them otherwise."""
    decoding = Decoding.of(pair, config.sampling)
    own = dict(decoding.own.settings)
    if NOT_APPLIED in own:
        folder.note(**{NOT_APPLIED: own.pop(NOT_APPLIED)})
    resolved = {
        "dtype": str(pair.dtype).removeprefix("torch."),
        "device": str(pair.device),
        "backend": pair.backend,
        "sampling": decoding.sampling.to_dict(),
        "format": pair.format.name,
        **own,
    }
    folder.note_once("the set-up", resolved=resolved)
    folder.note_date(pair)


def _calibrate(record: Run, experiment: Experiment) -> Subspace:
    path = record.path / "subspace.safetensors"
    has_subspace = is_made(path, Subspace.load)
    if not (has_subspace and is_made(record.path / "moments.safetensors", GradientMoments.load)):
        with record.stage("extract"):
            moments = experiment.moments()
            if not has_subspace:
                experiment.subspace(moments).save(path)
    return record.subspace


def _prove(record: Run, experiment: Experiment, subspace: Subspace) -> None:
    """Hooks and folded weights do the same: the lens model under hooks against the folded twin, firings counted."""
    pair, strength = experiment.pair, experiment.config.strength
    # without the lens engine no lens model is built, and of some models there is none
    if "hooks" in record.notes or experiment.config.engine == "twin" or pair.backend == "none":
        return
    with record.stage("extract"):
        with projected(pair.lens, subspace, strength) as projection:
            hooked = pair.check_logits(pair.lens)
        with folded(pair.hf, subspace, strength):
            parity = Parity.between(pair.check_logits(pair.hf), hooked)
        if not parity.within(pair.dtype):
            raise SPDError(
                f"hooks and folded weights disagree for {pair.name} (logits by {parity.logits:.2g} of their spread); "
                "use dtype='float32' or another backend"
            )
        firings = {str(site): n for site, n in projection.firings.items()}
        record.note(hooks={"firings": firings, "fold_parity": asdict(parity)})


def _self_generate(record: Run, experiment: Experiment, steered: Policy) -> None:
    prompts = experiment.prompts
    # some of the same prompts with the same noise: what differs, the projection changed
    compared = prompts[: experiment.config.n_compared]
    for stage, name, chosen, policy in (
        ("generate", "corpus.jsonl", prompts, steered),
        ("compare", "unprojected.jsonl", compared, None),
    ):
        if not Corpus.is_finished(record.path / name):
            log.info("generating %d completions with%s the projection", len(chosen), "" if policy else "out")
            with record.stage(stage):
                experiment.generate(record.path / name, policy, chosen)


def _distil(record: Run, experiment: Experiment) -> None:
    if is_finished(record.path / "adapter"):
        return
    corpus = record.corpus
    log.info("fine-tuning on %d completions, %d epochs", len(corpus), experiment.config.epochs)
    with record.stage("finetune"):
        experiment.finetune(corpus, record.path / "adapter")


def _effects(record: Run, experiment: Experiment, target: str, policies: dict[str, Policy]) -> None:
    """Teacher-forced: base, projection, fine-tuned, and random subspaces of the same ranks as the control."""
    config, path = experiment.config, record.effects_path(target)
    items = experiment.items(target)
    if not items or is_made(path, read_json):
        return
    log.info("measuring aligned loss and KL on %d held-out solutions of %s", len(items), target)
    subspace = policies["projected"].subspace
    assert subspace is not None
    random = [
        Policy(f"random-{i}", subspace.random_like(config.seed + i), config.strength) for i in range(config.n_random)
    ]
    with record.stage("effects"):
        write_effects(path, experiment.measure(items, [*policies.values(), *random]))


def _score(record: Run, experiment: Experiment, target: str, policies: dict[str, Policy]) -> None:
    measured = record.effects_path(target).exists()
    for name in experiment.config.policies:
        path = record.path / "eval" / target / f"{name}.json"
        if is_made(path, EvalResult.load):
            continue
        log.info("scoring %s on the test items of %s", name, target)
        with record.stage("evaluate"):
            forced = record.effects(target)[name] if measured else None
            experiment.score(target, policies[name], path, completions=path.with_suffix(".jsonl"), forced=forced)
