"""`Estimated`: subspaces of a run's estimator, or of another, at any rank and at any site with gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from spd_lens import estimators
from spd_lens.examples import Example
from spd_lens.models import ModelPair
from spd_lens.runs import Experiment, Run
from spd_lens.sites import Site
from spd_lens.subspaces import GradientMoments, Rank, Subspace, resolve_rank

Layers = Literal["all"] | None
PAPER = "paper"


class Estimated:
    """What an analysis projects: subspaces of the run's calibration examples, as one estimator takes them."""

    def __init__(self, run: Run, experiment: Experiment, name: str | None = None, layers: Layers = None) -> None:
        """Extracts nothing yet.

        Args:
            run: The run, whose own subspace is given back where it is asked for.
            experiment: Where its gradients are found or extracted.
            name: The estimator; None: the run's own.
            layers: Where there are gradients: `"all"`, or None for the run's own layers.

        Raises:
            SPDError: there is no such estimator, or it cannot give a subspace with the run's settings.
        """
        self.name = name or run.config.estimator
        self.is_paper = self.name == PAPER
        self._run, self._experiment, self._layers = run, experiment, layers
        self._shape = replace(run.config.shape, energy=None)
        self._estimator = estimators.get(self.name)
        self._estimator.check(self._shape)
        # the rank 1 is one direction and the rank 1.0 is all of them; a subspace that is trained takes minutes
        self._known = lru_cache(maxsize=8, typed=True)(self._taken)

    @property
    def moments(self) -> GradientMoments:
        """The gradients of all tokens at all sites, extracted together with what the estimator reads beside them."""
        return self._experiment.moments(layers=self._layers, keep=self._estimator.needs.get("keep", ()))

    def __call__(self, rank: Rank, sites: Iterable[Site], *, per_head: bool) -> Subspace:
        """The subspace at these sites. The centre, and whether gradients are centred, are the run's."""
        return self._known(rank, tuple(sorted(sites)), per_head)

    def _taken(self, rank: Rank, sites: Sequence[Site], per_head: bool) -> Subspace:
        shape = replace(self._shape, rank=rank, per_head=per_head)
        if self.is_paper:  # the moments remember their decomposition, which serves every rank
            return self.moments.subspace(**asdict(shape), sites=sites)
        if self._is_own(shape, sites):
            return self._run.subspace
        return self._estimator.subspace(_At(self._experiment, self._layers, sites), shape)

    def _is_own(self, shape: estimators.Shape, sites: Sequence[Site]) -> bool:
        """Whether that is what the run itself projected, however its rank is written."""
        config, own = self._run.config, self._run.subspace
        if self.name != config.estimator or replace(config.shape, rank=shape.rank) != shape or own.sites != [*sites]:
            return False
        widths = {basis.shape[1] for basis in own.bases.values()}
        return all(resolve_rank(shape.rank, width) == resolve_rank(config.rank, width) for width in widths)


@dataclass(frozen=True)
class _At:
    """A run as the source of an estimator that is to know some sites alone."""

    experiment: Experiment
    layers: Layers
    sites: Sequence[Site]

    @property
    def pair(self) -> ModelPair:
        return self.experiment.pair

    @property
    def calibration(self) -> list[Example]:
        return self.experiment.calibration

    @property
    def seed(self) -> int:
        return self.experiment.seed

    def gradients(self, **how: Any) -> GradientMoments:
        return self.experiment.moments(layers=self.layers, **how).at(self.sites)
