"""`Method`: what one way of self-distillation does differently from the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from spd_lens.corpus import Corpus
from spd_lens.methods.workshop import Workshop
from spd_lens.subspace import Subspace


@dataclass(frozen=True)
class Projection:
    """What generation is done under."""

    subspace: Subspace
    strength: float = 1.0


class Method:
    """Everything that methods share is done once, outside of them: prompts, training, items, measures.

    A method says under which projection completions are sampled, how they are sampled, and which are kept. The
    defaults are those of plain self-retraining. To add one, put a file into this package with a subclass under
    `@register`, or register it from your own module.
    """

    name: ClassVar[str]
    """What studies and tables call it."""
    says: ClassVar[str]
    """What it is, in a few words, with its source."""
    trains: ClassVar[bool] = True
    """False for the model as it is."""
    is_control: ClassVar[bool] = False
    """Whether it exists only to be compared with."""

    def projection(self, workshop: Workshop) -> Projection | None:
        """The projection during generation; None for none."""
        return None

    def sampling(self, workshop: Workshop) -> Mapping[str, float | int | None]:
        """`temperature`, `top_p`, `top_k` of generation; None leaves the model's own."""
        config = workshop.config
        return {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}

    def curated(self, corpus: Corpus) -> Corpus:
        """The completions to train on."""
        return corpus
