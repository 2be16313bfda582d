"""What is measured: every entrant's subspaces at one KL from base, teacher-forced on held-out items."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spd_lens import estimators
from spd_lens.analysis.common import JsonFolder
from spd_lens.analysis.estimators.settings import OWN, PAPER, RANDOM, Contest, Entrant, Place, union_of_needs
from spd_lens.errors import SPDError
from spd_lens.evaluation import (
    OUTCOMES,
    ForcedItem,
    ForcedPasses,
    Policy,
    all_at_equal_kl,
    other_texts,
    teacher_forced,
    with_answer_only,
)
from spd_lens.examples import Example
from spd_lens.files import is_made
from spd_lens.models import dtype_name, weights_digest
from spd_lens.subspaces import GradientMoments, Subspace
from spd_lens.tasks import Task

log = logging.getLogger(__name__)

RESULTS = "results"
"""The mark of results, and the file of those that had to be found."""
_STEPS = 6
"""Strengths that are tried for a subspace until its KL is right, as a rule."""
_TOGETHER = 8
"""Subspaces for each pass of the base model, and as many as a contest that is killed measures again."""


@dataclass
class Draw(estimators.Calibration):
    """One draw of calibration examples, of which one extraction keeps what any of the entrants needs."""

    always: tuple[str, ...] = ()

    def gradients(self, *, keep: Sequence[str] = (), **asked: Any) -> GradientMoments:
        """As `Source.gradients`; more is kept than was asked for."""
        return super().gradients(keep=sorted({*keep, *self.always}), **asked)


@dataclass
class Held:
    """A contest as it is held in one place: cells are measured once and kept in the place's folder."""

    place: Place
    contest: Contest
    refused: dict[str, str] = field(default_factory=dict)
    """Cells of which an estimator made no subspace, and why."""

    def __post_init__(self) -> None:
        experiment = self.place.experiment
        self.pair, self.task, self.config = experiment.pair, experiment.task, experiment.config
        drawn = self.task.test(self.contest.n_items, self.config.data_seed)
        self.items = [item for item in drawn if item.measurable]
        if len(self.items) < 2:
            raise SPDError(f"task {self.task.name} has no test items with correctness spans, which a contest needs")
        texts = other_texts(self.contest.n_texts)
        self.matching, self.reporting = texts[::2], texts[1::2]
        self.store = JsonFolder(self.place.folder / "cells")
        self.store.what = "a contest"

    def measure(self) -> None:
        """Measure every cell that is not there yet."""
        self.store.check(self._settings())
        self._mark()
        draws = {span: self._calibrations(self.place.task_of(span)) for span in self.contest.all_spans}
        self._announce()
        for span in draws:  # the task's own first, of whose subspaces random ones have the ranks
            for number, examples in enumerate(draws[span]):
                todo = [one for one in self.contest.entrants(span) if one.cell(number) not in self.store]
                source = Draw(
                    self.pair, examples, self.contest.seed + number, self.config.extraction,
                    self.place.experiment.progress, always=union_of_needs(self.contest.estimators),
                )  # fmt: skip
                self._measure({one.cell(number): self._subspace(one, number, source) for one in todo})
        for rank in self.contest.ranks:
            random = Entrant(RANDOM, OWN, rank)
            paper = Subspace.load(self._file(Entrant(PAPER, OWN, rank).cell(0)))
            todo = [n for n in range(self.contest.random_draws) if random.cell(n) not in self.store]
            self._measure({random.cell(n): paper.random_like(self.contest.seed + n) for n in todo})

    def values(self, entrant: Entrant | None, outcome: str) -> Float[np.ndarray, "draw item"] | None:
        """What the draws of an entrant (None: the base model) did to each item; items that cannot be measured are NaN.

        None where some draw does not reach the KL, or made no subspace; of random subspaces, those that reach it.
        """
        if entrant is None:
            cells = [self.store.read("base")]
        else:
            cells = [record for record in self.cells(entrant) if record and record.get("items")]
            least = 2 if entrant.estimator == RANDOM else self.contest.draws
            if len(cells) < least:
                return None
        return np.array([cell["items"][outcome] for cell in cells], dtype=float)

    def cells(self, entrant: Entrant) -> list[dict[str, Any] | None]:
        """What was kept of each draw; None where an estimator made no subspace."""
        n = self.contest.random_draws if entrant.estimator == RANDOM else self.contest.draws
        return [self.store.read(entrant.cell(draw)) for draw in range(n)]

    def policy(self, entrant: Entrant, draw: int = 0) -> Policy:
        """The policy of a cell that reached the KL."""
        record = self.store.read(entrant.cell(draw))
        saved = Subspace.load(path := self._file(entrant.cell(draw)))
        if saved.digest() != record["digest"]:
            raise SPDError(
                f"{path} is not the subspace that was measured; remove {self.store.path(entrant.cell(draw))}, and hold "
                "the contest again"
            )
        return Policy(entrant.estimator, saved.truncate(record["rank"]), record["strength"])

    @cached_property
    def passes(self) -> ForcedPasses:
        """What the base model computed on the texts that are measured: the same for all cells."""
        return ForcedPasses(self.pair, keep=True)

    def _mark(self) -> None:
        """Mark the items' results where a search finds them, such as by running programs: once, for all cells."""
        if not self.task.finds_results:
            return
        if RESULTS not in self.store:
            log.info("%s: finding the results of %d items", self.place.name, len(self.items))
            marked = {item.id: self.task.with_results(item).marks.get(RESULTS, ()) for item in self.items}
            self.store.write(RESULTS, marked)
        known = self.store.read(RESULTS)
        self.items = [replace(item, marks={**item.marks, RESULTS: known[item.id]}) for item in self.items]

    def _subspace(self, entrant: Entrant, draw: int, source: Draw) -> Subspace | None:
        path = self._file(entrant.cell(draw))
        if is_made(path, Subspace.load):
            return Subspace.load(path)
        shape = estimators.Shape(
            entrant.rank, per_head=self.config.per_head, center=self.config.center,
            center_gradients=self.config.center_gradients,
        )  # fmt: skip
        log.info("%s: estimating %s, draw %d", self.place.name, entrant.name, draw)
        try:
            estimators.get(entrant.estimator).subspace(source, shape).save(path)
        except SPDError as error:
            if entrant.estimator == PAPER:
                raise
            self.refused[entrant.cell(draw)] = str(error)
            log.warning("%s is left out: %s", entrant.cell(draw), error)
            return None
        return Subspace.load(path)

    def _measure(self, subspaces: Mapping[str, Subspace | None]) -> None:
        """Measure cells side by side, which share the base model's passes, and keep them."""
        every = [(name, subspace) for name, subspace in subspaces.items() if subspace is not None]
        for start in range(0, len(every), _TOGETHER):
            self._measure_some(dict(every[start : start + _TOGETHER]))

    def _measure_some(self, made: Mapping[str, Subspace]) -> None:
        log.info("%s: measuring %s", self.place.name, ", ".join(made))
        for name, subspace in made.items():
            subspace.save(self._file(name))
        policies = all_at_equal_kl(self.pair, made, self.matching, self.contest.kl)
        reached = [policy for policy in policies.values() if policy is not None]
        found = self._forced([Policy("base"), *reached])
        if "base" not in self.store:
            self.store.write("base", {"items": _columns(found["base"])})
        elsewhere = {}
        if reached:
            elsewhere = teacher_forced(self.pair, self.reporting, reached, passes=self.passes, progress=False)
        for name, policy in policies.items():
            if policy is None or policy.subspace is None:
                log.info("%s does not move the model as far as a KL of %g", name, self.contest.kl)
                self.store.write(name, {"reached": False})
                continue
            ranks = [rank for of_site in policy.subspace.ranks.values() for rank in of_site]
            kl = float(np.mean([item.kl for item in elsewhere[name]]))
            record = {"reached": True, "strength": policy.strength, "rank": max(ranks), "kl": kl}
            self.store.write(name, {**record, "digest": made[name].digest(), "items": _columns(found[name])})

    def _forced(self, policies: Sequence[Policy]) -> dict[str, list[ForcedItem]]:
        found = teacher_forced(
            self.pair, self.items, policies, passes=self.passes, batch_tokens=self.contest.batch_tokens,
            progress=self.place.experiment.progress,
        )  # fmt: skip
        return with_answer_only(self.pair, self.task, self.items, policies, found, passes=self.passes, progress=False)

    def _calibrations(self, task: Task) -> list[list[Example]]:
        """Draws of calibration examples that share none, or where there are too few, each drawn anew."""
        n, draws, seed = self.contest.n_calibration, self.contest.draws, self.config.data_seed
        for more in (
            0,
            n,
            4 * n,
        ):  # texts that do not fit may be left out; a larger draw begins with a smaller one
            try:
                together = task.calibration(n * draws + more, seed)
            except SPDError:
                continue
            if len(together) >= n * draws:
                return [together[i * n : (i + 1) * n] for i in range(draws)]
        log.warning("%s has no %d disjoint draws of %d calibration examples: they overlap", task.name, draws, n)
        return [task.calibration(n, seed + i) for i in range(draws)]

    def _announce(self) -> None:
        """Say what it takes before it begins."""
        contest = self.contest
        wanted = [one.cell(draw) for one in contest.entrants() for draw in range(contest.draws)]
        wanted += [Entrant(RANDOM, OWN, rank).cell(n) for rank in contest.ranks for n in range(contest.random_draws)]
        todo = sum(name not in self.store for name in wanted)
        each = 2 * len(self.items) + _STEPS * len(self.matching) + len(self.reporting)
        log.info(
            "%s: %d of %d subspaces are to be measured, each on %d items (with reasoning and without) and matched on "
            "%d texts in about %d steps: about %d texts through the layers from the first projected one on, after at "
            "most %d times %d calibration examples for each kind of extraction",
            self.place.name, todo, len(wanted), len(self.items), len(self.matching), _STEPS, todo * each,
            contest.draws * len(contest.all_spans), contest.n_calibration,
        )  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        """What decides a cell's numbers. Estimators, spans, ranks and random draws do not: a folder can take more."""
        fixed = {"n_calibration", "draws", "n_items", "kl", "n_texts", "seed", "batch_tokens"}
        return {
            "model": self.pair.name,
            "dtype": dtype_name(self.pair.dtype),
            **self.pair.format.settings,
            "weights": weights_digest(self.pair.hf),
            "task_options": self.task.options(),
            "sources": self.task.sources(),
            "items": [item.id for item in self.items],
            **({"finds_results": True} if self.task.finds_results else {}),
            **self.contest.model_dump(mode="json", include=fixed),
            **self.config.model_dump(mode="json", include={"data_seed", "per_head", "center", "center_gradients"}),
            "extraction": self.config.extraction.model_dump(mode="json"),
        }

    def _file(self, cell: str) -> Path:
        return self.place.folder / "subspaces" / f"{cell}.safetensors"


def _columns(items: Sequence[ForcedItem]) -> dict[str, list[float | None]]:
    return {outcome: [getattr(item, outcome) for item in items] for outcome in OUTCOMES}
