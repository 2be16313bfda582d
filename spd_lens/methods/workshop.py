"""`Workshop`: what methods work from, with everything that several of them need made once and kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spd_lens.capture import extract
from spd_lens.config import SPDConfig
from spd_lens.controls import shuffled_answers
from spd_lens.errors import SPDError
from spd_lens.examples import Example
from spd_lens.models import ModelPair
from spd_lens.models.prompts import Loss
from spd_lens.moments import GradientMoments
from spd_lens.storage import is_made
from spd_lens.subspace import Subspace
from spd_lens.tasks import Task


@dataclass(frozen=True)
class Workshop:
    """A model, a source task, settings and a seed, and the folder where shared artefacts are kept."""

    pair: ModelPair
    task: Task
    config: SPDConfig
    """Everything but what the method decides; `config.seed` is the seed of sampling, training and controls."""
    folder: Path
    """Extractions are kept here, named by what decides them; several seeds and methods share one folder."""
    progress: bool = False

    @property
    def calibration(self) -> list[Example]:
        """The worked examples. They depend on `data_seed` and not on `seed`: all seeds see the same."""
        return self.task.calibration(self.config.n_calibration, self.config.data_seed)

    def moments(self, *, loss: Loss | None = None, shuffled: bool = False) -> GradientMoments:
        """Gradient moments of the calibration examples, extracted on first use.

        Args:
            loss: `"aligned"` or `"full"`; None: the config's.
            shuffled: With the answers permuted between the examples (the permutation depends on the seed).

        Raises:
            SPDError: the folder holds an extraction of another model, of other sites or of another number of examples.
        """
        loss = loss or self.config.loss
        examples = self.calibration
        if shuffled:  # with a longer answer than its own, an example may no longer fit
            examples = self.task.kept("calibration", shuffled_answers(examples, self.config.seed))
        name = f"moments-{loss}-shuffled-{self.config.seed}" if shuffled else f"moments-{loss}"
        path = self.folder / f"{name}.safetensors"
        if not is_made(path, GradientMoments.load):
            extract(
                self.pair, examples, layers=self.config.layers, kinds=self.config.kinds, loss=loss,
                engine=self.config.engine, progress=self.progress,
            ).save(path)  # fmt: skip
        found = GradientMoments.load(path)
        self._check(found, path, len(examples))
        return found

    def subspace(self, moments: GradientMoments | None = None, *, of: str = "gradient") -> Subspace:
        """The config's rank, blocks and centring, from the plain moments or from others."""
        config = self.config
        return (moments or self.moments()).subspace(
            config.rank, per_head=config.per_head, center=config.center, of=of
        )  # fmt: skip

    def _check(self, moments: GradientMoments, path: Path, n_wanted: int) -> None:
        moments.fingerprint.check(self.pair.fingerprint, str(path))
        wanted = sorted(self.pair.sites(self.config.layers, self.config.kinds))
        n_examples = int(moments.n_examples.sum())
        if moments.sites != wanted or n_examples != n_wanted:
            raise SPDError(
                f"{path} holds an extraction of {n_examples} examples at {', '.join(map(str, moments.sites))}, not of "
                f"{n_wanted} at {', '.join(map(str, wanted))}; give the workshop another folder"
            )
