"""`Subject`: a run directory as an analysis sees it, and the folder in it that analyses write to."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

from spd_lens.analysis.common.estimated import Estimated
from spd_lens.analysis.common.style import page
from spd_lens.errors import SPDError, integer_or_fraction
from spd_lens.examples import Example
from spd_lens.files import read_csv, read_json, record_files, write_json, write_text
from spd_lens.models import ModelPair
from spd_lens.runs import Experiment, Run
from spd_lens.sites import Site
from spd_lens.subspaces import GradientMoments, Rank, Subspace
from spd_lens.tasks import Task

log = logging.getLogger(__name__)


class Subject:
    """One run: the experiment that it was made by, with its model and data at hand, and what analyses save of it."""

    def __init__(self, run: Run | str | Path, *, pair: ModelPair | None = None, progress: bool = True) -> None:
        self.run = run if isinstance(run, Run) else Run.open(run)
        self.experiment = Experiment.opened(self.run, pair=pair, progress=progress)
        self.progress = progress
        self._said = False

    @property
    def name(self) -> str:
        """The directory's name, which labels it in tables and figures."""
        return self.run.path.resolve().name

    @property
    def folder(self) -> Path:
        """Where analyses of this run are kept."""
        return self.run.path / "analysis"

    @property
    def pair(self) -> ModelPair:
        """The model that the run was made with; `SPDError` if its weights have changed since."""
        return self.experiment.pair

    @property
    def task(self) -> Task:
        """The source task."""
        return self.experiment.task

    @property
    def targets(self) -> dict[str, Task]:
        """The tasks that the run was evaluated on."""
        return self.experiment.targets

    def calibration(self, n: int | None = None) -> list[Example]:
        """The run's calibration examples, or `n` drawn in the same way."""
        own = self.experiment
        return own.calibrated.calibration(n, self.run.config.data_seed) if n else own.calibration

    def held_out(self, n: int, task: str | None = None) -> list[Example]:
        """Test items with gold completions and spans: of the source task, or of one of the targets."""
        source = self.task if task is None else self.targets[task]
        items = [item for item in source.test(n, self.run.config.data_seed) if item.measurable]
        if not items:
            raise SPDError(f"task {task or self.run.config.task} has no test items with correctness spans")
        return items

    @property
    def moments(self) -> GradientMoments:
        """Moments of the calibration examples at the run's own layers."""
        return self.run.moments

    def say_estimator(self) -> None:
        """Log once, where a run has another estimator, that its gradients are compared by the paper's subspaces."""
        if not self._said and (name := self.run.config.estimator) != "paper":
            log.warning(
                "%s was run with estimator %r; the directions of its gradients that are compared here are those of "
                "estimator 'paper' (Eq. 9-11)", self.name, name,
            )  # fmt: skip
        self._said = True

    @property
    def subspace(self) -> Subspace:
        """The run's own, by whatever estimator."""
        return self.run.subspace

    def estimated(self, name: str | None = None, layers: Literal["all"] | None = None) -> Estimated:
        """Subspaces of any rank at the run's layers, or at all, by its own estimator or by another."""
        return Estimated(self.run, self.experiment, name, layers)

    @property
    def known_layers(self) -> Literal["all"] | None:
        """Where there are gradients already: at all layers if an analysis has extracted them, else the run's own."""
        return "all" if (self.folder / "moments-all-layers.safetensors").exists() else None

    def moments_everywhere(self) -> GradientMoments:
        """Moments of the same calibration examples at every layer: extracted once, kept in `analysis/`."""
        return self.experiment.moments(layers="all")

    def shuffled_moments(self, seed: int, layers: Literal["all"] | None = None) -> GradientMoments | None:
        """The null of shuffled answers: the same prompts with other examples' answers, at the run's layers or others.

        None, and a warning, where most examples have one and the same answer.
        """
        try:
            return self.experiment.moments(layers=layers, shuffled=True, seed=seed)
        except SPDError as error:
            log.warning("shuffled answers of %s left out: %s", self.name, error)
            return None

    def rank(self, text: str) -> Rank:
        """A rank as it is written on a command line; the run's own if the text is empty.

        Where the run kept a share of energy, the median rank of its blocks stands for it, and the log says so.
        """
        if not text and self.run.config.energy is not None:
            ranks = [rank for of_site in self.subspace.ranks.values() for rank in of_site]
            middle = max(1, round(median(ranks)))
            log.warning(
                "%s keeps ranks of %d to %d by their share of energy; rank %d, their median, stands for them here",
                self.name, min(ranks), max(ranks), middle,
            )  # fmt: skip
            return middle
        try:
            return integer_or_fraction(text) if text else self.run.config.rank
        except ValueError as error:
            raise SPDError(f"rank {text!r} is neither an integer nor a fraction; write 16 or 0.5") from error

    def save(
        self, name: str, frame: pd.DataFrame, figures: Sequence[go.Figure] = (), *, says: str = "", **facts: Any
    ) -> list[Path]:
        """Write `analysis/NAME.csv`, `.json` (settings and provenance) and, if there are figures, one page `.html`.

        Args:
            name: Name of the analysis, with a suffix if it has several tables.
            frame: A tidy table: one row per measurement, with units in `facts` or in the names of columns.
            figures: Figures of the page, one under the other.
            says: What the figures show, as a paragraph over them.
            facts: Settings of the analysis, for whoever reads the table later.
        """
        record = {"run": self.name, "model": self.run.config.model, "task": self.run.config.task, **facts}
        written = [
            write_text(self.folder / f"{name}.csv", frame.to_csv(index=False)),
            write_json(self.folder / f"{name}.json", record),
        ]
        if figures:
            title = f"{name.replace('_', ' ').replace('-', ' ')} of {self.name}"
            written.append(write_text(self.folder / f"{name}.html", page(title, figures, says=says, facts=record)))
        self.record(written)
        return written

    def record(self, files: Iterable[Path]) -> None:
        """List files of an analysis in the run's `manifest.json`, as far as they are in its folder."""
        own = [path for path in files if path.absolute().is_relative_to(self.folder.absolute())]
        record_files(self.run.path.absolute(), [path.absolute() for path in own], lambda _: "analyze")

    def saved(self, name: str) -> pd.DataFrame | None:
        """A table that an analysis left, or None."""
        path = self.folder / f"{name}.csv"
        return read_csv(path) if path.exists() else None

    def facts(self, name: str) -> dict[str, Any]:
        """The settings that a saved table was made with."""
        path = self.folder / f"{name}.json"
        return read_json(path, dict[str, Any]) if path.exists() else {}


def place(site: Site, block: int, per_head: bool) -> dict[str, Any]:
    """The columns `site`, `layer`, `kind`, `head` of a tidy row; `head` is `"all"` for a joint block."""
    return {"site": str(site), "layer": site.layer, "kind": site.kind, "head": str(block) if per_head else "all"}


def subjects(paths: Iterable[str | Path], progress: bool = True) -> list[Subject]:
    """Several runs, of which those of one model share one pair."""
    found = [Subject(path, progress=progress) for path in paths]
    for subject in found[1:]:
        subject.experiment.models = found[0].experiment.models
    names = [subject.name for subject in found]
    for name in names:
        if names.count(name) > 1:
            raise SPDError(f"two of the run directories are called {name!r}; rename one, since names label the figures")
    return found


def spectrum_note(subspace: Subspace, *, of_gradients: bool) -> str:
    """One sentence where a view of spectra is not, or cannot be, of this subspace's estimator; else nothing.

    Args:
        subspace: What is projected.
        of_gradients: Whether the view has the spectrum of the gradients as they are, which is the paper's estimator's.
    """
    name = subspace.origin.get("estimator", "paper")
    if name == "paper" or (subspace.singular_values and not of_gradients):
        return ""
    lacks = "" if subspace.singular_values else ", which has no singular values"
    if of_gradients:
        return (
            f"The subspace is of the estimator {name!r}{lacks}; spectra are of all gradients, as the paper takes them."
        )
    return f"The subspace is of the estimator {name!r}{lacks}, so there is no spectrum to show."
