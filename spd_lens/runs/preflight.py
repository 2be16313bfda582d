"""What can be known to be wrong before a run directory is made or an expensive stage begins."""

from __future__ import annotations

import logging
from typing import Any

from spd_lens import estimators
from spd_lens.errors import SPDError
from spd_lens.evaluation import known_as, models_published
from spd_lens.files import Schema, fitting, is_made, read_json
from spd_lens.generation import Decoding, check_room, corpus_digest, recorded_settings
from spd_lens.models import (
    TRAINING_LOG,
    Fingerprint,
    ModelPair,
    choose_backends,
    refuse_spread,
    resolve_device,
    resolve_dtype,
)
from spd_lens.protocols import protocol
from spd_lens.registry import did_you_mean
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.context_limit import forced_texts, left_out
from spd_lens.runs.experiment import Experiment
from spd_lens.runs.model_check import require_core
from spd_lens.runs.run_dir import Run
from spd_lens.subspaces import GradientMoments, resolve_rank
from spd_lens.tasks import Split
from spd_lens.training import resolve_targets, scored_padding, trackers

log = logging.getLogger(__name__)


def check_settings(config: SPDConfig) -> None:
    """Refuse what is wrong whatever the model: needs no model."""
    if config.published_name is not None and known_as(config.published_name) is None:
        known = models_published()
        hint = did_you_mean(config.published_name, known) or f"; they are known of {', '.join(known)}"
        raise SPDError(
            f"no published results are known here of {config.published_name!r}{hint}; leave published_name out for a "
            "model that is none of these"
        )
    estimators.get(config.estimator).check(config.shape)
    choose_backends(config.backend)
    resolve_dtype(config.dtype, resolve_device(config.device))
    config.training.check()
    trackers(config.report_to)


def check_data(experiment: Experiment) -> None:
    """Refuse wrong settings, sizes that the data sets do not have and tasks that cannot be scored: needs no model."""
    config, (source, targets) = experiment.config, experiment.made
    check_settings(config)
    say_protocol(experiment)
    source.spanned(config.span).calibration(config.n_calibration, config.data_seed)
    source.train(config.n_train, config.data_seed)
    for name, task in targets.items():
        task.test(config.n_test(name), config.data_seed)
        task.check_scorable()


def say_protocol(experiment: Experiment) -> None:
    """Log the tasks for which the protocol has no prompts and scores, so that their own stand."""
    chosen, (source, targets) = protocol(experiment.config.protocol), experiment.made
    names = dict.fromkeys(task.name for task in (source, *targets.values()))
    if chosen.task_options and (own := [name for name in names if name not in chosen.task_options]):
        log.warning(
            "protocol %r has no prompts and no scores for %s: these are as under 'paper'", chosen.name, ", ".join(own)
        )


def check_stage(experiment: Experiment, split: Split, n: int) -> None:
    """Before one stage alone, which takes `n` examples: refuse what is wrong, and count the texts that do not fit."""
    config, source, calibrates = experiment.config, experiment.made[0], split == "calibration"
    check_settings(config)
    say_protocol(experiment)
    drawn = source.spanned(config.span) if calibrates else source
    getattr(drawn, split)(n, config.data_seed)  # refused before the model is read
    if calibrates:
        check_subspace(config, experiment.pair)
    fitting = experiment.calibrated if calibrates else experiment.task
    left_out(experiment.pair, config, {split: {config.task: (fitting, n)}})


def check_subspace(config: SPDConfig, pair: ModelPair) -> None:
    """Refuse layers and ranks that the model does not have."""
    shape = pair.fingerprint
    for site in pair.sites(config.layers, config.kinds):
        n_heads, d_head = shape.heads_at(site)
        if config.energy is None:
            resolve_rank(config.rank, d_head * (1 if config.per_head else n_heads))


def check_model(experiment: Experiment, *, targets: bool = True) -> None:
    """Refuse settings and texts that this model cannot take: layers, ranks, LoRA targets, prompts beyond its context.

    And refuse a model for which hooks, folding and gradients are not what a run takes them for (`require_core`).
    Everything is tokenised once for this: a prompt that is too long should not come to light after the training.

    Args:
        experiment: Its model is loaded for this.
        targets: Whether to look at the tasks to evaluate on too.
    """
    config, pair = experiment.config, experiment.pair
    check_one_device(pair)
    check_subspace(config, pair)
    Decoding.of(pair, config.sampling)
    scored_padding(pair, config.training)
    if config.method == "lora":
        resolve_targets(pair.hf, config.lora_targets)
    require_core(pair, config.layers, config.kinds)  # before a lens model is built, which would fail and say less
    most = config.max_calibration_tokens
    longest = max(len(pair.encode(e, config.loss, config.engine, most).ids) for e in experiment.calibration)
    if config.engine == "lens":
        pair.lens_if_any(longest)  # the one that the run uses: the record of the run names its backend
    check_room(pair, experiment.prompts, config.max_new_tokens, config.max_prompt_tokens)
    check_completions(experiment)
    for name, task in experiment.targets.items() if targets else ():
        items = task.test(config.n_test(name), config.data_seed)
        try:
            check_room(pair, items, task.max_new_tokens)
        except SPDError as error:
            raise SPDError(f"{name} cannot be evaluated (its option max_new_tokens is the limit): {error}") from error
        for text in (text for item in items for text in forced_texts(task, item)):
            pair.encode(text)


def check_one_device(pair: ModelPair) -> None:
    """Refuse a model on several devices before anything that ends with a training."""
    instead = "leave device_map out, or call spd-lens extract, generate and evaluate, which take it"
    refuse_spread(pair.hf, "a run, which trains,", instead)


def check_completions(experiment: Experiment) -> None:
    """Refuse a length of training texts that leaves nothing of a completion, where that alone is trained on."""
    config = experiment.config
    if config.loss_on == "all" or config.max_length is None:
        return
    for example in experiment.prompts:
        n = len(experiment.pair.prompt_ids(example, config.max_prompt_tokens))
        if n >= config.max_length:
            raise SPDError(
                f"the training prompt {example.id!r} has {n} tokens, so that max_length = {config.max_length} leaves "
                "nothing of its completion to train on; raise max_length, set max_prompt_tokens below it, or train on "
                "the prompt too (loss_on 'all')"
            )


def check_kept(run: Run, pair: ModelPair) -> None:
    """Raise `SPDError` where what is there, and is not made again, is of another model or not of what is beside it.

    A manifest tells of most; but one may be missing, or not list what somebody has put there.
    """
    subspace = run.subspace if run.has_subspace else None
    if subspace is not None and subspace.fingerprint is not None:
        subspace.fingerprint.check(pair.fingerprint, str(run.subspace_path))
    if is_made(run.moments_path, GradientMoments.load):
        GradientMoments.load(run.moments_path).fingerprint.check(pair.fingerprint, str(run.moments_path))
    for path in (run.corpus_path, run.unprojected_path):
        made = (recorded_settings(path) or {}) if path.exists() else {}
        if of := made.get("fingerprint"):
            Fingerprint.from_dict(of, path).check(pair.fingerprint, str(path))
        if subspace is not None and made.get("subspace") not in (None, subspace.digest()):
            raise SPDError(
                f"{path} was generated under the subspace {made['subspace']}, and {run.subspace_path} is "
                f"{subspace.digest()}; restore the one, or delete the other to make it again"
            )
    if run.has_corpus and run.is_trained:
        made = fitting(_Trained, read_json(run.adapter / TRAINING_LOG), run.adapter / TRAINING_LOG).settings
        there = {"corpus": corpus_digest(run.corpus), "weights": run.notes.get("weights")}
        for name, digest in there.items():
            if None not in (digest, made.get(name)) and made[name] != digest:
                raise SPDError(
                    f"{run.adapter} was trained with the {name} {made[name]}, and those of {run.path} are {digest}; "
                    "restore them, or delete the adapter to train it again"
                )


class _Trained(Schema, extra="ignore"):
    """What is read of an adapter's `training.json`."""

    settings: dict[str, Any]
