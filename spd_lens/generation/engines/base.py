"""`Engine`: one way to turn jobs into completions under a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from spd_lens.errors import SPDError
from spd_lens.generation.jobs import Completions, Decoding, Job
from spd_lens.models import ModelPair
from spd_lens.settings import EngineSettings
from spd_lens.subspaces import Policy

Run = Callable[[Sequence[Job]], Iterator[Completions]]
"""A function from jobs to their completions, as they end and in whatever order."""


@dataclass
class Engine(ABC):
    """An engine for one model and one way to draw tokens. `generate` prepares it, and then runs it under each policy.

    A completion depends on its job alone, never on which others there are or what was interrupted.
    """

    pair: ModelPair
    decoding: Decoding
    settings: EngineSettings
    batch_size: int | None = None
    """Completions at a time, where the engine has batches; None: as many as memory allows."""

    name: ClassVar[str]
    """Letters, digits and dashes; what `engine=` and `--engine` take, and a corpus records."""
    says: ClassVar[str]
    """What it is, in a few words."""
    takes: ClassVar[tuple[str, ...]] = ()
    """The fields of `EngineSettings` that it reads; any other that is given is refused."""
    serves_one: ClassVar[bool] = False
    """Whether it runs only the one policy that somebody serves; any other is generated on the twin."""
    runs: ClassVar[Literal["twin", "lens"]] = "twin"
    """Which of the pair's models it is: whose weights a corpus records, and whose context limits a prompt."""

    @classmethod
    def check(cls, settings: EngineSettings) -> None:
        """Raise `SPDError` for a setting that the engine does not read."""
        given = [name for name in settings.given if name not in cls.takes]
        if given:
            takes = f"it takes {', '.join(cls.takes)}" if cls.takes else "it has no settings of its own"
            raise SPDError(
                f"the engine {cls.name!r} takes no {given[0]}; leave it out or choose another engine ({takes})"
            )

    def prepare(self, jobs: Sequence[Job], policies: Sequence[Policy]) -> Mapping[str, Any]:
        """Refuse what cannot be done before a file is begun.

        Args:
            jobs: All jobs, also those that a corpus file holds already.
            policies: The policies that they are to be done under; one but for a choice by prompt.

        Returns:
            What a corpus records of the engine beside its name, and compares when it is continued.

        Raises:
            SPDError: The engine cannot answer these jobs under these policies.
        """
        return {}

    @abstractmethod
    def under(self, policy: Policy) -> AbstractContextManager[Run]:
        """The engine, ready to complete jobs under a policy until the context ends."""
