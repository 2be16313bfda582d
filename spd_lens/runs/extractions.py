"""Which moments of the calibration examples are asked for, and in which files they may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spd_lens.errors import SPDError
from spd_lens.estimators import Source
from spd_lens.examples import Example
from spd_lens.files import is_made
from spd_lens.models import Loss, ModelPair
from spd_lens.settings import Extraction
from spd_lens.subspaces import GradientMoments, check_texts

Layers = Literal["all"] | None
"""Layers of an extraction: all, or None for the config's."""

KEPT = ("classes", "cross")
"""What moments may keep beside the plain sums (`Extraction.keep`)."""


@dataclass(frozen=True)
class Request:
    """Which moments are asked for. `keep`, `sinks`, `labels` and `seed` are settings of `extract`."""

    loss: Loss
    layers: Layers = None
    shuffled: bool = False
    """With the answers permuted between the examples."""
    seed: int = 42
    """Of the permutation, or of the labels that are drawn."""
    keep: str | Sequence[str] = ()
    sinks: str = "first"
    """Which positions are a class of their own, so that it counts where classes are kept."""
    labels: str = "gold"

    def __post_init__(self) -> None:
        wanted = self.keep.split(",") if isinstance(self.keep, str) else self.keep
        if unknown := [part for part in wanted if part not in KEPT]:
            raise SPDError(f"unknown keep {unknown[0]!r}; choose from {', '.join(KEPT)}")
        object.__setattr__(self, "keep", tuple(part for part in KEPT if part in wanted))
        if "classes" not in self.keep:
            object.__setattr__(self, "sinks", "first")

    def settings(self, own: Extraction) -> Extraction:
        """The settings of `extract`, where `own` are those of the experiment."""
        changes: dict[str, Any] = {"loss": self.loss, "seed": self.seed, "sinks": self.sinks, "labels": self.labels}
        layers = {"layers": self.layers} if self.layers else {}
        return own.model_copy(update={**changes, "keep": [*self.keep], **layers})

    def missing(self, moments: GradientMoments) -> list[str]:
        """What is asked for and not in these moments."""
        return [part for part in self.keep if part not in moments.kept]

    def places(self, folder: Path, plain: Loss | None) -> list[Path]:
        """The files in which such moments may be: that of every extraction, and those of what it may lack.

        Args:
            folder: The experiment's folder.
            plain: The loss that file names do not say; None: all say theirs, and all are side by side.
        """
        how = f"-{self.loss}" if self.loss != plain else ""
        how += f"-{self.layers}-layers" if self.layers else ""
        how += f"-shuffled-{self.seed}" if self.shuffled else ""
        how += f"-{self.sinks}-sinks" if self.sinks != "first" else ""
        how += f"-{self.labels}-labels-{self.seed}" if self.labels != "gold" else ""
        more = [self.keep, KEPT] if self.keep else []
        names = dict.fromkeys("-".join(["moments" + how, *kept]) for kept in ((), *more))
        apart = folder if plain is None else folder / "analysis"
        return [(folder if name == "moments" else apart) / f"{name}.safetensors" for name in names]

    def found(
        self, places: Sequence[Path], loaded: Mapping[Path, GradientMoments]
    ) -> tuple[Path, GradientMoments | None]:
        """Moments that serve, in memory or in a file, and their place; or the first free place, and None."""
        free = []
        for path in places:
            moments = loaded.get(path)
            if moments is None and is_made(path, GradientMoments.load):
                moments = GradientMoments.load(path)
            if moments is None:
                free.append(path)
            elif not self.missing(moments):
                return path, moments
        return [*free, path][0], None

    def check(self, moments: GradientMoments, path: Path, pair: ModelPair, own: Extraction, n_examples: int) -> None:
        """Raise `SPDError` unless the moments are of this model, these sites, so many examples, and texts read so."""
        settings = self.settings(own)
        moments.fingerprint.check(pair.fingerprint, str(path))
        wanted, there = sorted(pair.sites(settings.layers, settings.kinds)), int(moments.n_examples.sum())
        if moments.sites != wanted or there != n_examples:
            raise SPDError(
                f"{path} holds an extraction of {there} examples at {', '.join(map(str, moments.sites))}, not of "
                f"{n_examples} at {', '.join(map(str, wanted))}; give the experiment another folder"
            )
        check_texts(moments, pair, settings, str(path))


@dataclass(frozen=True)
class InHand:
    """A source whose gradients are there already."""

    source: Source
    """Where model, examples and seed come from."""
    moments: GradientMoments
    others: Source | None = None
    """Where gradients come from that are not these; None: nowhere."""

    @property
    def pair(self) -> ModelPair:
        return self.source.pair

    @property
    def calibration(self) -> list[Example]:
        return self.source.calibration

    @property
    def seed(self) -> int:
        return self.source.seed

    def gradients(
        self, *, keep: Sequence[str] = (), sinks: str = "first", labels: str = "gold", shuffled: bool = False
    ) -> GradientMoments:
        """The moments, if they are what is asked for; else those of `others`, or `SPDError`."""
        lacking = [f"no {part} (--keep {part})" for part in keep if part not in self.moments.kept]
        for name, usual, wanted in (("sinks", "first", sinks), ("labels", "gold", labels)):
            if name == "sinks" and "classes" not in keep:
                continue
            if (there := self.moments.settings.get(name, usual)) != wanted:
                lacking.append(f"{name} {there!r} and not {wanted!r} (--{name} {wanted})")
        if shuffled:
            lacking.append("no gradients towards shuffled answers")
        if not lacking:
            return self.moments
        if self.others is None:
            raise SPDError(f"these moments have {', '.join(lacking)}, which the estimator needs; extract what it needs")
        return self.others.gradients(keep=keep, sinks=sinks, labels=labels, shuffled=shuffled)
