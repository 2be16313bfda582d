"""Outcomes side by side: what teacher-forced items hold, as arrays, and which loss a choice goes by."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float

from spd_lens.evaluation import OUTCOMES, SAYS, ForcedItem

Values = dict[str, Float[np.ndarray, " item"]]
"""For each outcome, one number per item."""

LOSS_FIELDS = tuple(field for field in OUTCOMES if field.endswith("_loss"))
"""Every loss of `OUTCOMES`, in its order: none of them alone is what a policy does."""
FEWEST = 4
"""Items that must have an outcome before it is shown."""


def by_item(items: Sequence[ForcedItem], fields: Collection[str] = tuple(OUTCOMES)) -> Values:
    """Outcomes of these items as arrays; NaN where an item has no token of that kind.

    An outcome that fewer than `FEWEST` of the items have is left out, as results are where a task computes nothing.
    """
    found = {field: [getattr(item, field) for item in items] for field in fields}
    most = len(items) - min(FEWEST, len(items))
    return {field: np.array(own, dtype=float) for field, own in found.items() if own.count(None) <= most}


def known(values: Float[np.ndarray, "*draw item"], base: Float[np.ndarray, " item"]) -> Float[np.ndarray, "*draw some"]:
    """The items that have an outcome under the base: which these are depends on the items, never on the policy."""
    return values[..., ~np.isnan(base)]


def deciding(measured: Collection[str]) -> str:
    """The loss that a choice goes by: on results, which no copying lowers, or the aligned loss where there are none."""
    return "results_loss" if "results_loss" in measured else "aligned_loss"


def in_words(measured: Collection[str]) -> str:
    """What each of these outcomes says, one sentence after the other."""
    return " ".join(SAYS[field] for field in OUTCOMES if field in measured)
