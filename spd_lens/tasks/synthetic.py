"""What the synthetic tasks share: endless seeded examples whose splits are disjoint by construction.

A problem's own text decides which split it belongs to, so no seed, size or order of calls can bring a test problem
into calibration or training.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from spd_lens.errors import SPDError, whole
from spd_lens.examples import Example
from spd_lens.tasks.base import Pools, Split, Task, check_count, digest

_SHARES: dict[Split, range] = {"calibration": range(0, 20), "train": range(20, 70), "test": range(70, 100)}
"""Which of a hundred buckets belong to which split."""
_PATIENCE = 2000
"""Failed attempts in a row after which a generator counts as exhausted."""


def split_of(problem: str) -> Split:
    """The split that a problem belongs to, from the digest of its text."""
    bucket = int(digest(problem)[:8], 16) % 100
    return next(split for split, buckets in _SHARES.items() if bucket in buckets)


@dataclass(kw_only=True)
class SyntheticTask(Task):
    """A task that makes its own examples; `path` is not read, and the splits never share a problem."""

    difficulties: ClassVar[tuple[str, ...]] = ("easy", "medium", "hard")
    generator: ClassVar[str]
    """Names what `make` and `draw` generate. It changes when the examples do, and with nothing else."""

    difficulty: Literal["easy", "medium", "hard"] = "easy"
    """More steps and larger numbers; what each task makes of it stands in docs/tasks.md."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_option("difficulty", self.difficulties)

    @abstractmethod
    def make(self, rng: random.Random) -> Example:
        """One example, without an id."""

    def draw(self, split: Split, n: int | None, seed: int) -> list[Example]:
        if n is None:
            raise SPDError(f"{self.name} makes as many {split} examples as are wanted; say how many")
        n, seed = check_count(self.name, split, n, None), whole("seed", seed, least=None)
        rng = random.Random(f"{self.name}|{self.difficulty}|{split}|{seed}")  # a string seeds alike in every process
        drawn: dict[str, Example] = {}
        misses = 0
        while len(drawn) < n:
            example = self.make(rng)
            problem = self.problem(example)
            unfit = split == "calibration" and not self.calibrates(example)
            if problem in drawn or split_of(problem) != split or unfit:
                misses += 1
                if misses > _PATIENCE:
                    raise SPDError(
                        f"{n} different {split} examples of {self.name} ({self.difficulty}) were asked for, and its "
                        f"generator has about {len(drawn)}; ask for fewer, or for another difficulty"
                    )
                continue
            misses = 0
            # the id comes from the text: the same problem has the same id at every seed, another problem never
            drawn[problem] = replace(example, id=f"{self.name}-{split}-{digest(problem)[:12]}")
        return list(drawn.values())

    def pool(self, split: Split) -> list[Example]:
        """A fixed sample, for looking at; draws do not come from it."""
        return self.draw(split, 100, seed=0)

    def load(self) -> Pools:
        return Pools(train=self.pool("train"), test=self.pool("test"), calibration=self.pool("calibration"))

    def sources(self) -> dict[str, str]:
        options = {item.name: getattr(self, item.name) for item in fields(self) if item.name in ("difficulty", "span")}
        label = ", ".join(f"{name}={value}" for name, value in sorted(options.items()))
        return {f"generator of {self.name} ({label})": self.generator}

    def card(self) -> dict[str, Any]:
        return {**super().card(), "counts": "as many as are asked for"}
