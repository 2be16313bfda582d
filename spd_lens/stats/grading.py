"""`grade`: how far the evidence for a subspace or an adapter reaches, computed from findings and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from spd_lens.stats.finding import BASE, CALIBRATION, HELD_OUT, Finding

SEEDS, MODELS = 3, 2
"""How many seeds, and how many models, make a replication."""


class Level(IntEnum):
    """The levels of evidence; each includes those before it from `HELD_OUT` on."""

    NONE = 0
    CALIBRATION = 1
    HELD_OUT = 2
    BEATS_RANDOM = 3
    SEEDS = 4
    MODELS = 5

    def __str__(self) -> str:
        return _SAYS[self]


_SAYS = ("none", "seen in calibration", "held out", "beats random at equal damage", "replicated over seeds",
         "replicated over models")  # fmt: skip


@dataclass(frozen=True)
class Grade:
    """A level, and what it rests on."""

    level: Level
    reasons: tuple[str, ...]
    """The finding that carried each step, or why there is none."""

    def __str__(self) -> str:
        return str(self.level)

    @property
    def sentence(self) -> str:
        """The level and the last reason, for a report."""
        return f"{self.level} ({self.reasons[-1]})"


def grade(findings: Iterable[Finding], of: str | None = None) -> Grade:
    """The highest level that findings carry, over all outcomes and tasks.

    A question is one outcome on one task. Findings of another digest are replications, where they are of the same kind,
    method, outcome and task; they never count for the levels below.

    Args:
        findings: What was measured.
        of: The digest of what is graded; None: findings of a method, whatever was measured.
    """
    known = list(findings)
    own = [finding for finding in known if of in (None, finding.digest)]
    if not own:
        return Grade(Level.NONE, ("nothing was measured on it",))
    questions = dict.fromkeys(finding.question for finding in own)
    grades = [
        _grade([f for f in own if f.question == question], [f for f in known if f.question == question])
        for question in questions
    ]
    found = max(grades, key=lambda found: found.level)
    if of is None:  # what no single artefact has shown is not pieced together from several
        best = max((grade(known, digest) for digest in dict.fromkeys(f.digest for f in known)), key=lambda g: g.level)
        found = min(found, best, key=lambda found: found.level)
    return found


def _grade(own: Sequence[Finding], known: Sequence[Finding]) -> Grade:
    """The grade by one outcome on one task."""
    held = _carrier([f for f in own if f.against == BASE and f.data == HELD_OUT])
    if held is None:
        seen = _carrier([f for f in own if f.against == BASE and f.data == CALIBRATION])
        if seen is None:
            return Grade(Level.NONE, ("nothing that was measured is told from the base for the better",))
        return Grade(Level.CALIBRATION, (str(seen),))
    reasons = [str(held)]
    beats = _carrier([f for f in own if f.beats_random or (f.faces_random and not f.goes_well)])
    if beats is None:
        return Grade(Level.HELD_OUT, tuple(reasons))
    reasons.append(str(beats))
    replicated = {f.fingerprint: _seeds([g for g in known if g.fingerprint == f.fingerprint]) for f in known}
    if not (seeds := replicated[beats.fingerprint]):
        return Grade(Level.BEATS_RANDOM, tuple(reasons))
    reasons.append(f"the same with seeds {', '.join(map(str, seeds))} on {beats.model}, and none against it")
    # a model may have several names, or a copy of it other numbers: both must tell the models apart
    names = {f.fingerprint: f.model for f in known if replicated[f.fingerprint]}
    against = [f for f in known if f.faces_random and not f.goes_well]
    if against or min(len(names), len(set(names.values()))) < MODELS:
        return Grade(Level.SEEDS, tuple(reasons))
    reasons.append(f"the same over seeds on {', '.join(names.values())}, and on no model against it")
    return Grade(Level.MODELS, tuple(reasons))


def _carrier(findings: Sequence[Finding]) -> Finding | None:
    """The clearest finding for the better; None where there is none, or one that is as clear for the worse."""
    clear = [finding for finding in findings if finding.is_clear]
    if not clear or not all(finding.goes_well for finding in clear):
        return None
    return min(clear, key=lambda finding: 1.0 if finding.p is None else finding.p)


def _seeds(findings: Sequence[Finding]) -> list[int]:
    """The seeds with which one model has a subspace or adapter of its own that is better than the base and beats
    random; empty where they are too few, or one seed's value is against it."""
    faced = [finding for finding in findings if finding.faces_random]
    based = [f for f in findings if f.against == BASE and f.data == HELD_OUT and f.is_clear]
    if not all(finding.goes_well for finding in (*faced, *based)):
        return []
    better = {finding.digest for finding in based}
    # one seed for each: what has the same digest under several seeds is one artefact that was measured again
    made = {f.digest: f.seed for f in faced if f.beats_random and f.seed is not None and f.digest in better}
    return seeds if len(seeds := sorted(set(made.values()))) >= SEEDS else []
