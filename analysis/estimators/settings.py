"""`Contest`: what is compared with what, and on how much; `Place`: a model and task in which it is held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, field_validator

from spd_lens import estimators
from spd_lens.errors import SPDError
from spd_lens.models import ModelPair
from spd_lens.runs import Experiment, Run, SPDConfig, read_yaml, validated
from spd_lens.settings import Settings
from spd_lens.tasks import Task

OWN = "own"
"""The span that a task scores by itself."""
PAPER, RANDOM = "paper", "random"
"""The estimators that all others are compared with."""


@dataclass(frozen=True)
class Entrant:
    """One estimator at one rank, with calibration examples of one span."""

    estimator: str
    span: str
    rank: int | float

    @property
    def name(self) -> str:
        """Its name in files and tables."""
        return f"{self.estimator}.{self.span}.r{self.rank}"

    @property
    def columns(self) -> dict[str, str]:
        """The columns that name it in a table."""
        return {"estimator": self.estimator, "span": self.span, "rank": str(self.rank)}

    def cell(self, draw: int) -> str:
        """The name of what one draw gave."""
        return f"{self.name}.{draw}"


class Contest(Settings):
    """What a contest compares. Unknown keys are refused."""

    model_config = ConfigDict(allow_inf_nan=False)

    estimators: list[str] = Field(
        ["no-sink", "attribution", "contrast"],
        min_length=1,
        description="Estimators; paper and random are always among them.",
    )
    spans: list[str] = Field([OWN], min_length=1, description="Spans of the calibration examples: own, results, ...")
    ranks: list[int | float] = Field([0.5], min_length=1, description="Directions per block, or fractions of its width")
    draws: int = Field(3, ge=2, le=50, description="Draws of calibration examples; disjoint if there are enough.")
    n_calibration: int = Field(40, ge=2, description="Calibration examples in each draw.")
    n_items: int = Field(48, ge=4, description="Held-out test items.")
    kl: float = Field(0.1, gt=0, description="KL from base on other text at which all are compared, nats per token.")
    n_texts: int = Field(24, ge=2, le=24, description="Other texts: one half to match KL on, the other to report it.")
    random_draws: int = Field(10, ge=3, le=200, description="Random subspaces of each rank.")
    n_completions: int = Field(6, ge=0, description="Items that base, best, paper and random answer greedily.")
    completion_draws: int = Field(
        1, ge=1, description="Draws under which they answer; from two on, accuracy is compared as the losses are."
    )
    seed: int = Field(42, ge=0, lt=2**31, description="Seed of random subspaces, and of what estimators draw.")
    batch_tokens: int = Field(1024, ge=1, description="Padded tokens per batch.")

    @field_validator("estimators")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        for name in value:
            estimators.get(name)
        return [name for name in dict.fromkeys(value) if name != RANDOM]

    @field_validator("ranks")
    @classmethod
    def _ranks(cls, value: list[int | float]) -> list[int | float]:
        for rank in value:
            if rank < 1 if isinstance(rank, int) else not 0 < rank < 1:
                raise ValueError(f"rank {rank!r} is neither a number of directions from 1 on nor a fraction below 1")
        return list(dict.fromkeys(value))

    @classmethod
    def read(cls, path: str | Path) -> Contest:
        """The contest of a YAML file; `SPDError` names the first wrong setting in a sentence."""
        return validated(cls, read_yaml(path))

    def entrants(self, span: str | None = None) -> list[Entrant]:
        """Everything that is compared with random: the paper's on its own span first. With `span`, those of one."""
        wanted = [Entrant(PAPER, OWN, rank) for rank in self.ranks]
        wanted += [Entrant(*each) for each in product(self.estimators, self.spans, self.ranks)]
        return [one for one in dict.fromkeys(wanted) if span in (None, one.span)]

    @property
    def all_spans(self) -> list[str]:
        """The spans of which calibration examples are drawn, the task's own first."""
        return list(dict.fromkeys([OWN, *self.spans]))


@dataclass(frozen=True)
class Place:
    """A model and a task, and the folder for what is measured there."""

    name: str
    experiment: Experiment
    folder: Path

    @property
    def facts(self) -> dict[str, str]:
        """The model and the task, for tables."""
        config = self.experiment.config
        return {"place": self.name, "model": config.model, "task": config.task}

    def task_of(self, span: str) -> Task:
        """The task whose calibration examples have this span; `SPDError` if it cannot mark it."""
        return self.experiment.task if span == OWN else self.experiment.task.spanned(span)


def open_places(
    paths: Sequence[Path], out: Path | None, *, pair: ModelPair | None = None, progress: bool = True
) -> tuple[list[Place], Path]:
    """The places of run directories and of YAML files with a run's settings, and the folder of the report.

    Raises:
        SPDError: a path that is neither, two places of one name, or no folder to write to.
    """
    if out is None:
        if len(paths) > 1 or not paths[0].is_dir():
            raise SPDError("results of a contest without a run, or of several places, need a folder; give --out")
        out = paths[0] / "analysis" / "contest"
    found: list[Place] = []
    for path in paths:
        name = path.resolve().name if path.is_dir() else path.stem
        if name in {place.name for place in found}:
            raise SPDError(f"two of the places are called {name!r}; rename one, since names label the tables")
        if path.is_dir():
            experiment = Experiment.opened(Run.open(path), pair=pair, progress=progress)
        else:
            config = SPDConfig.make(read_yaml(path))
            experiment = Experiment(config, out / name, pair=pair, progress=progress)
        if found:
            experiment.models = found[0].experiment.models
        found.append(Place(name, experiment, out / name))
    return found, out


def union_of_needs(names: Sequence[str]) -> tuple[str, ...]:
    """What extractions must keep so that one of them serves all of these estimators."""
    needs: list[Mapping[str, Any]] = [estimators.get(name).needs for name in names]
    return tuple(sorted({part for need in needs for part in need.get("keep", ())}))
