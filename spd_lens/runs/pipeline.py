"""`run`: calibrate, generate, fine-tune and evaluate, each stage kept in the run directory and done once."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from spd_lens.errors import SPDError, strictly
from spd_lens.evaluation import NEUTRAL, fitting, other_texts
from spd_lens.examples import Example
from spd_lens.files import is_made, write_json
from spd_lens.generation import Corpus, engines
from spd_lens.models import ModelPair, Parity, neutral
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.experiment import Experiment
from spd_lens.runs.findings import write_evidence
from spd_lens.runs.guardrails import check_base, check_items
from spd_lens.runs.loading import decided_by, ready_pair
from spd_lens.runs.preflight import check_data, check_kept, check_model
from spd_lens.runs.run_dir import Run
from spd_lens.runs.stages import Step, note_start, score, work
from spd_lens.runs.summary import base_warnings, write_summary
from spd_lens.subspaces import GradientMoments, Policy, folded, projected

log = logging.getLogger(__name__)

N_OTHER = 16
"""How many of the other texts a run measures."""


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
        config = config.model_copy(update=decided_by(pair, config.prompt_format))
    Run(out).check(config)
    experiment = Experiment(config, out, progress=progress)
    check_data(experiment)
    keeps_lens = pair is not None and pair.has_lens
    experiment.pair = ready_pair(pair, config, Run(out))
    check_model(experiment)
    record = Run.open(out, config)
    with record.working():
        with record.guarded(config.strict):
            _note(record, experiment)
            check_kept(record, experiment.pair)
            drawn = {
                name: task.test(config.n_test(name), config.data_seed) for name, task in experiment.targets.items()
            }
            check_items((*experiment.prompts, *experiment.calibration), drawn)

            def do(step: Step, place: str, _: Sequence[Step]) -> None:
                log.info("%s %s", place, step.what)
                with record.stage(step.stage):
                    step.do()

            work(list(_steps(record, experiment)), experiment.pair, keeps_lens, do)
        write_evidence(record)
        write_summary(record)
        with strictly(config.strict):  # not noted: it follows from scores and settings, and stands in the summary
            check_base(base_warnings(record))
    log.info("finished: %s", record.path / "summary.md")
    return record


def _note(record: Run, experiment: Experiment) -> None:
    config, task, targets = experiment.config, experiment.task, experiment.targets
    data: dict[str, dict[str, Any]] = {
        "the data of the source task": {"data": task.sources()},
        "the data of the evaluation": {"eval_data": {name: target.sources() for name, target in targets.items()}},
    }
    note_start(record, {config.task: experiment}, config.n_test, data)
    cards = {config.task: task.card(), **{name: target.card() for name, target in targets.items()}}
    write_json(record.path / "data_card.json", cards)


def _steps(record: Run, experiment: Experiment) -> Iterator[Step]:
    """All steps of a run, in order."""
    config, prompts = experiment.config, experiment.prompts
    yield Step(
        "extract", "finding the subspace",
        lambda: record.has_subspace and is_made(record.moments_path, GradientMoments.load),
        partial(_calibrate, record, experiment),
    )  # fmt: skip
    # without the lens engine no lens model is built, and of some models there is none
    if config.engine != "twin" and experiment.pair.backend != "none":
        yield Step(
            "extract", "comparing hooks with folded weights",
            lambda: "hooks" in record.notes, partial(_prove, record, experiment),
        )  # fmt: skip
    yield Step(
        "generate", f"generating {len(prompts)} completions with the projection",
        lambda: record.has_corpus,
        lambda: experiment.generate(
            record.corpus_path, _policy(record, "projected"), prompts, saved=record.subspace_path
        ),
    )  # fmt: skip
    # some of the same prompts with the same noise: what differs, the projection changed
    compared = prompts[: config.n_compared]
    unserved = "twin" if engines.find(config.generation_engine).serves_one else None
    yield Step(
        "compare", f"generating {len(compared)} completions without the projection",
        lambda: Corpus.is_finished(record.unprojected_path),
        lambda: experiment.generate(record.unprojected_path, None, compared, engine=unserved),
    )  # fmt: skip
    yield Step(
        "finetune",
        f"fine-tuning on {len(prompts)} completions, {'at most ' * config.early_stop}{config.epochs} epochs",
        lambda: record.is_trained, lambda: experiment.finetune(record.corpus, record.path / "adapter"),
    )  # fmt: skip
    for target in experiment.targets:
        if items := experiment.items(target):
            yield Step(
                "effects", f"measuring losses and KL on {len(items)} held-out solutions of {target}",
                partial(record.has_effects, target), partial(_measure, record, experiment, target, items),
            )  # fmt: skip
    if texts := fitting(experiment.pair, other_texts(N_OTHER)):
        yield Step(
            "effects", f"measuring loss and KL on {len(texts)} other texts",
            partial(_has_other, record), partial(_measure, record, experiment, NEUTRAL, texts, side=True),
        )  # fmt: skip
    for target, name in itertools.product(experiment.targets, config.policies):
        yield Step(
            "evaluate", f"scoring {name} on the test items of {target}",
            partial(record.has_result, target, name), partial(_score, record, experiment, target, name),
        )  # fmt: skip


def _policy(record: Run, name: str) -> Policy:
    """One of the three policies of a run; its artefacts are read."""
    if name == "projected":
        return Policy(name, record.subspace, record.config.strength)
    return Policy(name, adapter=record.adapter if name == "spd" else None)


def _calibrate(record: Run, experiment: Experiment) -> None:
    experiment.moments()
    if not record.has_subspace:
        experiment.subspace().save(record.subspace_path)


def _prove(record: Run, experiment: Experiment) -> None:
    """Hooks and folded weights do the same: the lens model under hooks against the folded twin, firings counted."""
    pair, subspace, strength = experiment.pair, record.subspace, experiment.config.strength
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


def _has_other(record: Run) -> bool:
    """Whether other texts were measured; a run that an earlier version has finished without them is left as it is."""
    if record.effects_path(NEUTRAL, side=True).exists():
        return record.has_effects(NEUTRAL, side=True)
    return (record.path / "summary.md").exists()


def _measure(record: Run, experiment: Experiment, name: str, items: list[Example], *, side: bool = False) -> None:
    """Teacher-forced: base, projection, fine-tuned, and random subspaces of the same ranks as the control.

    `name` is a target, or with `side` a set of texts that SPD was not aimed at.
    """
    config, subspace = experiment.config, record.subspace
    policies = [_policy(record, name) for name in ("base", "projected", "spd")]
    policies += [
        Policy(f"random-{i}", subspace.random_like(config.seed + i), config.strength) for i in range(config.n_random)
    ]
    record.write_effects(name, experiment.measure(items, policies, None if side else name), side=side)


def _score(record: Run, experiment: Experiment, target: str, name: str) -> None:
    score(experiment, record, target, name, _policy(record, name))
