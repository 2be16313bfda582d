"""`Finding`: one difference that was measured, with the stored results that it follows from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from spd_lens.errors import UNREADABLE, SPDError, one_line
from spd_lens.stats.corrections import holm, sign_flip
from spd_lens.stats.estimate import Estimate
from spd_lens.stats.intervals import paired_difference, verdict

BASE, RANDOM = "base", "random"
"""What a finding that counts for a grade is against: the model as it is, and directions at random."""
CALIBRATION, HELD_OUT = "calibration", "held-out"
"""The data of a finding: examples that the subspace was made from, or items that nothing was made from."""
GOOD = {"results_loss": -1, "answer_only_loss": -1, "aligned_loss": -1, "completion_loss": -1, "accuracy": 1}
"""Outcomes that can carry a grade, and which way is better; how much changed (KL) and what was copied cannot."""
EQUAL_DAMAGE = 0.1
"""Two sides did equal damage if their KL from the base differ by at most this share of the larger."""
ALPHA = 0.05


@dataclass(frozen=True)
class Finding:
    """One paired difference between a policy with a subspace or an adapter and another policy, on the same items.

    Raises:
        SPDError: a field holds what no measurement gives.
    """

    kind: str
    """`"subspace"` (under the projection) or `"adapter"` (after training)."""
    digest: str
    """Names what was measured: `Subspace.digest()` or `adapter_digest`."""
    method: str
    """What made it, by the method's name in a study: `spd`, `spd-no-sink`."""
    outcome: str
    """One of `GOOD`."""
    task: str
    data: str
    """`"calibration"` or `"held-out"`."""
    against: str
    """`"base"`, `"random"`, or another method's name."""
    difference: Estimate
    """This policy minus the other: nats per token, or points of accuracy."""
    model: str
    fingerprint: str
    """`Fingerprint.digest()` of the model."""
    sources: Mapping[str, str]
    """sha256 of every stored result that it follows from, by its path below the folder of the run or study."""
    kl: float | None = None
    """KL(base || policy) of what was measured, in nats per token."""
    kl_against: float | None = None
    """The same of what it is compared with."""
    p: float | None = None
    """p-value, corrected where `correction` says so."""
    correction: str = ""
    """Name of the correction and the number of comparisons; empty where there was none."""
    seed: int | None = None
    """Seed of the draws: calibration, sampling, training, random directions."""

    def __post_init__(self) -> None:
        given = [x for x in (self.kl, self.kl_against, self.p) if x is not None]
        are_numbers = all(_is_number(x) and math.isfinite(x) for x in (self.difference.value, *given))
        texts = (self.method, self.task, self.against, self.model, self.correction)
        are_texts = all(isinstance(text, str) and text.isprintable() for text in texts)
        faults = {
            "kind": self.kind not in ("subspace", "adapter"),
            "data": self.data not in (CALIBRATION, HELD_OUT),
            "outcome": not isinstance(self.outcome, str) or self.outcome not in GOOD,
            "digest": not _is_hex(self.digest, 16),
            "fingerprint": not _is_hex(self.fingerprint, 16),
            "difference": not are_numbers or not _in_order(self.difference),
            "p": are_numbers and not 0 <= (self.p or 0) <= 1,
            "kl": are_numbers and min(self.kl or 0, self.kl_against or 0) < 0,
            "seed": self.seed is not None and type(self.seed) is not int,
            "sources": not self.sources or not all(map(_is_source, self.sources, self.sources.values())),
            "method, task, against, model or correction": not are_texts,
        }
        if wrong := [name for name, fault in faults.items() if fault]:
            raise SPDError(
                f"a finding has {wrong[0]} that no measurement gives ({getattr(self, wrong[0], texts)!r:.100}); "
                "findings are computed from stored results, so measure again instead of writing them"
            )

    @property
    def goes_well(self) -> bool:
        """Whether the value, whatever its interval, is on the better side of 0."""
        return self.difference.value * GOOD[self.outcome] > 0

    @property
    def is_clear(self) -> bool:
        """Whether the interval, and the p-value if there is one, exclude chance."""
        return verdict(self.difference, self.p, ALPHA) in ("higher", "lower")

    @property
    def faces_random(self) -> bool:
        """Whether it is a comparison with random directions on held-out items, at equal damage."""
        if self.against != RANDOM or self.data != HELD_OUT or not self.kl or not self.kl_against:
            return False
        return abs(self.kl - self.kl_against) <= EQUAL_DAMAGE * max(self.kl, self.kl_against)

    @property
    def beats_random(self) -> bool:
        """Whether it is better than random directions at equal damage, after correction."""
        return self.faces_random and self.goes_well and self.is_clear and self.p is not None and bool(self.correction)

    @property
    def question(self) -> tuple[str, str, str, str]:
        """What another finding must share to be a replication: kind, method, outcome and task."""
        return self.kind, self.method, self.outcome, self.task

    def __str__(self) -> str:
        damage = "" if self.kl is None else f", KL {self.kl:.3g}"
        damage += "" if self.kl_against is None else f" against {self.kl_against:.3g}"
        p = "" if self.p is None else f", p {self.p:.2g} ({self.correction or 'not corrected'})"
        seed = "" if self.seed is None else f", seed {self.seed}"
        return (
            f"{self.outcome} on {self.task} ({self.data}) against {self.against}: {self.difference}{damage}{p}{seed}, "
            f"{self.model}, from {', '.join(self.sources)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "difference": self.difference.to_dict()}

    @classmethod
    def from_dict(cls, record: Any) -> Finding:
        """What `to_dict` made; `SPDError` for anything else."""
        try:
            fields = dict(record)
            ends = dict(fields.pop("difference"))
            for end, missing in (("low", -math.inf), ("high", math.inf)):
                ends[end] = missing if ends[end] is None else ends[end]
            return cls(difference=Estimate(**ends), **fields)
        except UNREADABLE as error:
            raise SPDError(f"a finding cannot be read ({one_line(error)}); measure again") from error

    @classmethod
    def paired(cls, before: Sequence[float], after: Sequence[float], **about: Any) -> Finding:
        """`after - before`, paired by item: bootstrap interval, and p of a sign-flip test, not corrected.

        Args:
            before: The other side's values, one per item.
            after: The values of what is measured, on the same items.
            about: All other fields.
        """
        difference = paired_difference(before, after)
        p = sign_flip(b - a for a, b in zip(before, after, strict=True))
        return cls(difference=difference, p=p, **about)


def corrected(findings: Iterable[Finding]) -> list[Finding]:
    """The same findings with Holm's correction of their p-values, in two families: those against random directions at
    equal damage, and those against the base. Others count for nothing, and are not corrected."""
    found = list(findings)
    for belongs in (lambda one: one.faces_random, lambda one: one.against == BASE):
        places = [i for i, one in enumerate(found) if belongs(one) and one.p is not None]
        for i, p in zip(places, holm(found[i].p or 0.0 for i in places), strict=True):
            found[i] = replace(found[i], p=p, correction=f"Holm over {len(places)}")
    return found


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _in_order(estimate: Estimate) -> bool:
    ends, n = (estimate.low, estimate.high), estimate.n
    return all(map(_is_number, ends)) and ends[0] <= estimate.value <= ends[1] and type(n) is int and n > 0


def _is_hex(text: object, digits: int) -> bool:
    return isinstance(text, str) and re.fullmatch(rf"[0-9a-f]{{{digits}}}", text) is not None


def _is_source(name: object, sha256: object) -> bool:
    """Whether a file is named by a path below the folder, which no other file of the machine can be."""
    if not isinstance(name, str) or not name.isprintable():
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and _is_hex(sha256, 64)
