"""`run_rounds`: SPD again on what SPD made, with drift from the first model and a rule for when to stop."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel

from spd_lens.errors import SPDError, whole
from spd_lens.evaluation import ForcedItem
from spd_lens.examples import Example
from spd_lens.files import forget, is_blank, is_made, read_csv, read_json, reading, replacing, write_json, write_text
from spd_lens.models import ModelPair, merged_copy, neutral, weights_digest
from spd_lens.runs.config import SPDConfig
from spd_lens.runs.experiment import Experiment
from spd_lens.runs.loading import decided_by, ready_pair
from spd_lens.runs.pipeline import run
from spd_lens.runs.preflight import check_data, check_one_device
from spd_lens.runs.round_drift import Drift, StopRule, drift_frame
from spd_lens.runs.run_dir import Folder, Run
from spd_lens.subspaces import GradientMoments, Policy
from spd_lens.tasks import Task

log = logging.getLogger(__name__)


class Rounds(Folder):
    """The folder of several rounds.

    | file | what |
    | --- | --- |
    | `rounds.json` | settings, versions, why it stopped |
    | `round-1/`, `round-2/`, ... | ordinary runs, each on the model that the last one left |
    | `after-0/`, `after-1/`, ... | `moments.safetensors` of the model after so many rounds, and `effects.json` |
    | `rounds.csv` | one row per round: `Drift`, with intervals |
    """

    settings_file = notes_file = "rounds.json"

    def run(self, number: int) -> Run:
        """The run of one round, counted from 1."""
        return Run(self.path / f"round-{number}")

    def moments(self, number: int) -> GradientMoments:
        """Gradient moments of the model after `number` rounds; 0 is the first model."""
        return GradientMoments.load(self.path / f"after-{number}" / "moments.safetensors")

    def effects(self, number: int) -> list[ForcedItem]:
        """Held-out items under the model after `number` rounds; their KL is from the first model."""
        return read_json(self.path / f"after-{number}" / "effects.json", list[ForcedItem])

    @property
    def adapters(self) -> list[Path]:
        """The adapters of the finished rounds, in the order in which they belong on the first model."""
        found: list[Path] = []
        while (path := self.path / f"round-{len(found) + 1}" / "adapter").exists():
            found.append(path)
        return found

    @property
    def table(self) -> pd.DataFrame:
        """`rounds.csv`."""
        return read_csv(self.path / "rounds.csv")

    def model(self, pair: ModelPair, number: int | None = None) -> ModelPair:
        """The model after `number` rounds (None: all that are finished), as a pair of its own in float32."""
        adapters = self.adapters
        if number is not None and not 0 <= number <= len(adapters):
            raise SPDError(f"{self.path} has {len(adapters)} finished rounds, so there is no model after {number}")
        for adapter in adapters[:number]:
            pair = merged(pair, adapter)
        return pair


@neutral()
def run_rounds(
    config: SPDConfig,
    out: str | Path,
    n_rounds: int = 3,
    *,
    reextract: str = "current",
    stop: StopRule | None = None,
    n_held_out: int = 64,
    progress: bool = True,
    pair: ModelPair | None = None,
) -> Rounds:
    """Several rounds of SPD, each an ordinary run on the model that the last round left.

    Adapters are merged into float32 weights in memory, one after the other, so that nothing is lost between rounds and
    every round trains a fresh LoRA; in a narrower dtype an adapter of a small learning rate would be rounded away.
    Round `k` samples with `seed + k - 1`; prompts and items are the same in all rounds (`data_seed`). Killed and
    started again, it continues.

    Args:
        config: Settings of the first round. `dtype` must be float32, or auto, which is float32 here.
        out: The folder; new, or of rounds with the same settings (more of them may be asked for).
        n_rounds: Number of rounds at most.
        reextract: `"current"`: each round's subspace is that of the model it starts from; `"first"`: always the first
            model's, which needs the estimator `"paper"`.
        stop: When to end early; None: `StopRule()`.
        n_held_out: Test items of the source task for drift and stop rule. They come behind the items that the runs are
            evaluated on, which stay untouched by the rule.
        progress: Show progress bars.
        pair: The first model, if it is loaded already; float32. It is left as it is.

    Raises:
        SPDError: another dtype; too few test items; a folder of other settings; what `run` refuses.
    """
    rule = StopRule() if stop is None else stop
    n_rounds, n_held_out = whole("n_rounds", n_rounds), whole("n_held_out", n_held_out)
    if reextract not in ("current", "first"):
        raise SPDError(f"reextract is {reextract!r}; it must be 'current' or 'first'")
    if reextract == "first" and config.estimator != "paper":
        raise SPDError(
            f"estimator {config.estimator!r} may read more of the first model than its moments, so that "
            "reextract='first' is not possible with it; use reextract='current'"
        )
    config = _in_float32(config, pair)
    experiment = Experiment(config, out, progress=progress)
    check_data(experiment)
    held_out_items(config, experiment.made[0], n_held_out)
    folder = Rounds(out)
    _check_place(folder)
    with folder.working():
        _note(folder, config, {"reextract": reextract, "stop": asdict(rule), "n_held_out": n_held_out})
        first = experiment.pair = ready_pair(pair, config, folder)
        check_one_device(first)
        folder.note_date(first)
        held_out = held_out_items(config, experiment.task, n_held_out)
        folder.note_once("the first model", weights=weights_digest(first.hf))
        stopped = None
        for number in range(n_rounds + 1):
            if number:
                log.info("round %d of at most %d", number, n_rounds)
                known = folder.path / f"after-{number - 1 if reextract == 'current' else 0}" / "moments.safetensors"
                record = _round(folder.run(number), experiment, number, known)
                experiment = experiment.varied(pair=merged(experiment.pair, record.adapter))
            _measure(folder, number, first, experiment, held_out)
            if number and (stopped := _drifted(folder, experiment, number, rule)):
                break
        folder.note(stopped=stopped)
    return folder


def _drifted(folder: Rounds, experiment: Experiment, number: int, rule: StopRule) -> str | None:
    """Write the table of the rounds that are done. Returns why to stop.

    Overlaps are those of the paper's subspaces, which the moments after each round are enough for.
    """
    start = folder.moments(0)
    drifts = [
        Drift.between(
            done,
            [folder.effects(i) for i in (0, done - 1, done)],
            [experiment.subspace(moments, estimator="paper") for moments in (start, folder.moments(done))],
            [experiment.subspace(half, estimator="paper") for half in start.halves()],
        )
        for done in range(1, number + 1)
    ]
    write_text(folder.path / "rounds.csv", drift_frame(drifts).to_csv(index=False))
    reason = rule.reason(drifts[-1])
    if reason:
        log.info("stopped after round %d: %s", number, reason)
    return reason


def merged(pair: ModelPair, adapter: str | Path) -> ModelPair:
    """A pair of its own whose weights are `pair`'s with the adapter merged in, in float32."""
    hf = merged_copy(pair.hf, adapter).to(pair.device)
    return ModelPair(
        hf, pair.tokenizer, name=pair.name, backend=pair.asked_backend, **pair.format.settings,
    )  # fmt: skip


def held_out_items(config: SPDConfig, source: Task, n: int) -> list[Example]:
    """`n` test items of the source task behind those that the runs are evaluated on."""
    evaluated = config.n_test(config.task) if config.task in config.targets.values() else 0
    drawn = source.draw("test", evaluated + n, config.data_seed)[evaluated:]
    items = [item for item in source.kept("test", drawn) if item.measurable]
    if len(items) < 2:
        raise SPDError(f"{len(items)} of {n} held-out items have spans, and drift needs two or more; raise n_held_out")
    return items


@dataclass(frozen=True)
class _Weights(Policy):
    """The policy of another model of the same shape: its weights on the pair's twin meanwhile."""

    model: PreTrainedModel | None = None

    @property
    def is_base(self) -> bool:
        return False

    @contextlib.contextmanager
    def applied(self, pair: ModelPair) -> Iterator[nn.Module]:
        assert self.model is not None
        theirs = dict(self.model.named_parameters())
        saved = {name: parameter.detach().clone() for name, parameter in pair.hf.named_parameters()}
        try:
            with torch.no_grad():
                for name, parameter in pair.hf.named_parameters():
                    parameter.copy_(theirs[name])
            yield pair.hf
        finally:
            with torch.no_grad():
                for name, parameter in pair.hf.named_parameters():
                    parameter.copy_(saved[name])


def _in_float32(config: SPDConfig, pair: ModelPair | None) -> SPDConfig:
    dtype = config.dtype if pair is None else str(pair.dtype).removeprefix("torch.")
    if dtype not in ("auto", "float32"):
        raise SPDError(
            f"dtype is {dtype!r}, in which merged adapters are rounded away between rounds; use dtype='float32'"
        )
    changes: dict[str, Any] = {"dtype": "float32"}
    if pair is not None:
        changes |= decided_by(pair, config.prompt_format)
    return config.model_copy(update=changes)


def _check_place(folder: Rounds) -> None:
    """Refuse a place that holds something else."""
    noted = folder.path / folder.notes_file
    if not folder.is_free and (not noted.exists() or is_blank(noted)):
        raise SPDError(f"{folder.path} exists and does not hold rounds; choose a new directory")


def _note(folder: Rounds, config: SPDConfig, others: dict[str, Any]) -> None:
    """Settings and machine, or a refusal where the rounds were begun with other settings."""
    settings = {"config": config.model_dump(mode="json"), **others}
    noted = folder.notes.get("settings")
    if noted is not None:  # earlier versions had fewer settings, whose defaults count
        with reading(folder.path / folder.notes_file):
            same = not SPDConfig.make(noted["config"]).differences(config)
            settings = noted if same and {**noted, "config": settings["config"]} == settings else settings
    folder.note_once("the settings of the rounds", settings=settings)
    folder.note_environment()


def _round(record: Run, experiment: Experiment, number: int, moments: Path) -> Run:
    """One run, with moments that are known already in their place."""
    config = experiment.config
    config = config.model_copy(update={"seed": (config.seed + number - 1) % 2**32})
    if not is_made(record.moments_path, GradientMoments.load):
        Run.open(record.path, config)  # a run directory of these settings, into which an extraction may be put
        forget(record.moments_path)
        with replacing(record.moments_path) as scratch:
            shutil.copyfile(moments, scratch)
    return run(config, record.path, progress=experiment.progress, pair=experiment.pair)


def _measure(folder: Rounds, number: int, first: ModelPair, experiment: Experiment, items: Sequence[Example]) -> None:
    """Moments and held-out effects of the experiment's model, which is that after a round."""
    current, place = experiment.pair, folder.path / f"after-{number}"
    had_lens = current.has_lens
    experiment.varied(path=place).moments()
    if not had_lens:
        current.drop_lens()  # what follows runs on the twin
    if not is_made(place / "effects.json", lambda path: read_json(path, list[ForcedItem])):
        policy = Policy("current") if current is first else _Weights("current", model=current.hf)
        found = experiment.varied(pair=first).measure(items, [policy])["current"]
        write_json(place / "effects.json", [item.to_dict() for item in found])
