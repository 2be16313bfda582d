"""`Estimator`: one rule that makes a subspace of a model and calibration examples; `Source`: what it is made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Protocol

from spd_lens.errors import SPDError, whole
from spd_lens.examples import Example
from spd_lens.models import ModelPair
from spd_lens.settings import Extraction
from spd_lens.subspaces import GradientMoments, Rank, Subspace, extract, shuffled_answers


@dataclass(frozen=True)
class Shape:
    """How large a subspace is, and around what it projects. The fields are those of `GradientMoments.subspace`."""

    rank: Rank = 0.5
    """Directions per block: an integer, or a fraction of the block's width."""
    energy: float | None = None
    """In place of the rank a share in (0, 1] of each block's squared singular values."""
    per_head: bool = True
    """Whether each head gets a projector of its own, or all heads one joint projector."""
    center_gradients: bool = False
    """Whether the mean row of the gradients is taken off before they are decomposed."""
    center: bool = False
    """Whether to project around the mean activation instead of the origin."""


class Source(Protocol):
    """A model, calibration examples and what was extracted with them: a `Calibration`, or a run's `Experiment`."""

    @property
    def pair(self) -> ModelPair:
        """The model."""

    @property
    def calibration(self) -> list[Example]:
        """The worked examples."""

    @property
    def seed(self) -> int:
        """The seed of whatever is drawn."""

    def gradients(
        self, *, keep: Sequence[str] = (), sinks: str = "first", labels: str = "gold", shuffled: bool = False
    ) -> GradientMoments:
        """Moments of the calibration examples; `shuffled`: with the answers permuted between them.

        The other arguments are those of `extract`. What was extracted once is kept.
        """


class Estimator:
    """One way to choose a subspace. It may read all of its source; it sees no item that is evaluated.

    docs/estimators.md has the formulas, and docs/extending.md says how to add one.
    """

    name: ClassVar[str]
    """The name in settings and tables."""
    says: ClassVar[str]
    """A short description, with its source."""
    is_control: ClassVar[bool] = False
    """Whether it exists only as a comparison."""
    needs: ClassVar[Mapping[str, Any]] = {}
    """Keywords of the extraction that it reads, such as `{"keep": ("classes",)}`."""
    lacks: ClassVar[Mapping[str, str]] = {}
    """Fields of `Shape` that must stay at their default, with the reason as the end of a sentence."""

    def subspace(self, source: Source, shape: Shape) -> Subspace:
        """The directions to keep, at most as many per block as asked for.

        A block keeps fewer where fewer are known, as in `GradientMoments.subspace`; `Subspace.ranks` says so.

        Raises:
            SPDError: the shape asks for what the estimator has not, or the source holds nothing to estimate from.
        """
        self.check(shape)
        found = self.estimate(source, shape)
        return replace(found, origin={"estimator": self.name, **found.origin})

    def check(self, shape: Shape) -> None:
        """Raise `SPDError` for a shape that the estimator cannot give, whatever the model."""
        for setting, reason in self.lacks.items():
            if getattr(shape, setting) != getattr(Shape, setting):
                raise SPDError(f"estimator {self.name!r} takes no {setting}: {reason}")

    def estimate(self, source: Source, shape: Shape) -> Subspace:
        """What `subspace` returns, before it is marked with the estimator's name: the top directions of `moments`."""
        return self.moments(source).subspace(**asdict(shape))

    def moments(self, source: Source, *, shuffled: bool = False) -> GradientMoments:
        """The source's moments with what the estimator needs; `shuffled`: towards permuted answers."""
        return source.gradients(**self.needs, shuffled=shuffled)


@dataclass
class Calibration:
    """A source without a run: a model and worked examples.

    ```python
    source = spd.estimators.Calibration(pair, task.calibration(n=50, seed=42))
    subspace = spd.estimators.get("attribution").subspace(source, spd.estimators.Shape(rank=0.75))
    ```
    """

    pair: ModelPair
    examples: Iterable[Example]
    seed: int = 42
    """Seed of permutations, of sampled labels and of what estimators draw."""
    settings: Extraction | None = None
    """How gradients are captured, and where. None: the paper's choice."""
    progress: bool = False
    """Whether extractions show a progress bar."""
    _kept: dict[tuple[Any, ...], GradientMoments] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.examples, self.seed = list(self.examples), whole("seed", self.seed, least=None)
        usual = Extraction.model_validate({})
        for name in ("keep", "sinks", "labels"):
            if self.settings is not None and getattr(self.settings, name) != getattr(usual, name):
                raise SPDError(
                    f"{name} is not for the settings of a Calibration, since estimators ask for what they need; leave "
                    "it out, or give gradients of your own to `extract` and `GradientMoments.subspace`"
                )

    @property
    def calibration(self) -> list[Example]:
        """The worked examples."""
        return list(self.examples)

    def gradients(
        self, *, keep: Sequence[str] = (), sinks: str = "first", labels: str = "gold", shuffled: bool = False
    ) -> GradientMoments:
        """As `Source.gradients`; each combination is extracted once."""
        key = (tuple(keep), sinks, labels, shuffled)
        if key not in self._kept:
            examples = shuffled_answers(self.calibration, self.seed) if shuffled else self.calibration
            how = Extraction.given(self.settings, {"keep": keep, "sinks": sinks, "labels": labels}, "gradients")
            if labels != "gold":
                how = how.model_copy(update={"seed": self.seed})
            self._kept[key] = extract(self.pair, examples, settings=how, progress=self.progress)
        return self._kept[key]
