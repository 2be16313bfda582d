"""Policies that do the same damage: the strength, and where need be the rank, at which KL from base is as asked."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from statistics import fmean

from spd_lens.errors import SPDError
from spd_lens.evaluation.teacher_forced import ForcedPasses, teacher_forced
from spd_lens.examples import Example
from spd_lens.models import ModelPair, neutrally
from spd_lens.subspaces import Policy, Subspace

KL_TOLERANCE = 0.05
"""Relative. Half of it in strength, since KL grows about with its square."""
_STEPS = 20
_MARGIN = 0.1
"""A guess lies at least this share of the bracket away from its ends, so that the bracket shrinks at every step."""


def at_equal_kl(
    pair: ModelPair,
    subspace: Subspace,
    texts: Sequence[Example],
    kl: float,
    *,
    tolerance: float = KL_TOLERANCE,
) -> Policy | None:
    """The projection onto a subspace at the strength at which it moves the model by `kl`: see `all_at_equal_kl`."""
    return all_at_equal_kl(pair, {"projected": subspace}, texts, kl, tolerance=tolerance)["projected"]


@neutrally
def all_at_equal_kl(
    pair: ModelPair,
    subspaces: Mapping[str, Subspace],
    texts: Sequence[Example],
    kl: float,
    *,
    tolerance: float = KL_TOLERANCE,
) -> dict[str, Policy | None]:
    """Projections that all move the model equally far, so that what they do can be compared.

    KL grows with the strength, and about with its square, which says where in a bracket of (0, 1] to look next. Where a
    subspace at full strength moves the model less, its leading directions alone are kept, fewer and fewer, until it
    moves it far enough. All subspaces are searched side by side and share the base model's one pass.

    Args:
        pair: The model; the base is its twin as it stands.
        subspaces: By the name that the policy gets.
        texts: Examples on whose completions KL is measured.
        kl: Mean over the texts of KL(base || policy), in nats per token of the completion; above 0.
        tolerance: How far KL may be off, relative to `kl`.

    Returns:
        For each name its policy; None where not even one direction per block at full strength moves the model so far,
        or where KL jumps over `kl` from one strength to the next that differs.

    Raises:
        SPDError: `kl` is no positive number, `tolerance` no share, or the model gives no finite KL.
    """
    if isinstance(kl, bool) or not isinstance(kl, int | float) or not (math.isfinite(kl) and kl > 0):
        raise SPDError(f"policies cannot be matched at a KL of {kl!r}; give a number of nats per token above 0")
    if not 0 < tolerance < 1:
        raise SPDError(
            f"a tolerance of {tolerance!r} is no share of the KL; give one above 0 and below 1, such as 0.05"
        )
    searches = {name: _search(name, subspace, kl, tolerance) for name, subspace in subspaces.items()}
    asked, found = {name: next(search) for name, search in searches.items()}, {}
    passes = ForcedPasses(pair, keep=True)
    while asked:
        measured = teacher_forced(pair, texts, [*asked.values()], passes=passes, progress=False)
        for name, items in measured.items():
            mean = fmean(item.kl for item in items)
            if not math.isfinite(mean):
                raise SPDError(f"the KL from base of {name} is {mean}; use float32, or leave it out")
            try:
                asked[name] = searches[name].send(mean)
            except StopIteration as end:
                found[name] = end.value
                del asked[name]
    return {name: found[name] for name in subspaces}


def _search(name: str, subspace: Subspace, wanted: float, tolerance: float) -> Generator[Policy, float, Policy | None]:
    """Yields policies to measure, is sent the KL of each, and returns the one that was looked for."""
    policy = Policy(name, subspace)
    while (found := (yield policy)) < wanted * (1 - tolerance):
        largest = max(max(ranks) for ranks in subspace.ranks.values())
        if largest <= 1:
            return None
        subspace = subspace.truncate(largest * 3 // 4)
        policy = Policy(name, subspace)
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        if abs(found - wanted) <= tolerance * wanted:
            break
        low, high = (policy.strength, high) if found < wanted else (low, policy.strength)
        guess = policy.strength * math.sqrt(wanted / found) if found > 0 else high
        margin = (high - low) * _MARGIN
        policy = Policy(name, subspace, min(max(guess, low + margin), high - margin))
        found = yield policy
    return policy if abs(found - wanted) <= tolerance * wanted else None
