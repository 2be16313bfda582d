"""`Method`: what one way of self-distillation does differently from the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from spd_lens.generation import Corpus
from spd_lens.runs import Experiment, SPDConfig
from spd_lens.subspaces import Policy, Subspace


def Projection(subspace: Subspace, strength: float = 1.0) -> Policy:
    """The policy of a projection, under the name that methods written for earlier versions use."""
    return Policy("projected", subspace, strength)


class Method:
    """Everything that methods share is done once, outside of them: prompts, training, items, measures.

    A method is given the `Experiment` of its source and seed, and says under which policy completions are sampled, how
    they are sampled, and which are kept. The defaults are those of plain self-retraining. docs/extending.md says
    how to add one.
    """

    name: ClassVar[str]
    """The name of the method in studies and tables."""
    says: ClassVar[str]
    """A short description, with its source."""
    is_control: ClassVar[bool] = False
    """Whether the method exists only as a comparison."""
    needs: ClassVar[Mapping[str, Any]] = {}
    """Keywords of the extraction that its subspace needs (`Estimator.needs`), so that a study extracts once for all."""

    def check(self, config: SPDConfig) -> None:
        """Raise `SPDError` for settings that the method cannot work with, before a study begins."""

    def projection(self, experiment: Experiment) -> Policy | None:
        """The policy under which completions are generated: a subspace and a strength. None: the model as it is."""
        return None

    def sampling(self, experiment: Experiment) -> Mapping[str, float | int | None]:
        """`temperature`, `top_p`, `top_k` of generation; None leaves the model's own."""
        config = experiment.config
        return {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}

    def training(self, experiment: Experiment) -> Mapping[str, Any]:
        """Fields of `TrainingSettings` that are not the config's."""
        return {}

    def curated(self, corpus: Corpus) -> Corpus:
        """The completions to train on."""
        return corpus
