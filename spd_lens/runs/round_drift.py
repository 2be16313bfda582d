"""How far rounds of self-distillation have taken a model from where it began, and when that is far enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pandas as pd

from spd_lens.errors import SPDError
from spd_lens.evaluation import ForcedItem
from spd_lens.stats import Estimate, mean_interval, paired_difference, verdict
from spd_lens.subspaces import Subspace


@dataclass(frozen=True)
class Drift:
    """How far a round has moved the model, measured on held-out items. Losses and KL are in nats per token."""

    round: int
    aligned_loss: Estimate
    loss_change: Estimate
    """Against the model before the round, paired by item."""
    loss_change_in_all: Estimate
    """Against the first model, paired by item."""
    kl: Estimate
    """KL(first || current) on gold completions."""
    overlap: float
    """Share of the first subspace's directions that the current model's holds: mean of `tr(P₁ P) / r` over blocks."""
    overlap_of_halves: float
    """The same measure between two halves of the calibration examples, on the first model."""
    overlap_by_chance: float
    """The same measure between random subspaces: `r / width`."""

    @classmethod
    def between(
        cls,
        number: int,
        items: Sequence[Sequence[ForcedItem]],
        subspaces: Sequence[Subspace],
        halves: Sequence[Subspace],
    ) -> Drift:
        """The drift after one round.

        Args:
            number: Number of the round, counted from 1.
            items: The same held-out items under the first model, before the round and after it.
            subspaces: The subspaces of the first model and of the current one.
            halves: Two subspaces of the first model, from disjoint halves of the examples.
        """
        first, before, after = ([item.aligned_loss for item in own] for own in items)
        start = subspaces[0]
        chance = [r / start.bases[site].shape[1] for site in start.sites for r in start.ranks[site] if r]
        return cls(
            round=number,
            aligned_loss=mean_interval(after),
            loss_change=paired_difference(before, after),
            loss_change_in_all=paired_difference(first, after),
            kl=mean_interval([item.kl for item in items[2]]),
            overlap=overlap(start, subspaces[1]),
            overlap_of_halves=overlap(*halves),
            overlap_by_chance=fmean(chance),
        )


@dataclass(frozen=True)
class StopRule:
    """When no further round is begun. It looks at held-out items that no run is evaluated on."""

    on_rising_loss: bool = True
    """The aligned loss rises beyond noise (paired 95 % interval above 0) over the last round's or the first model's."""
    kl_budget: float | None = 1.0
    """Largest KL(first || current) in nats per token; None for any."""

    def __post_init__(self) -> None:
        if self.kl_budget is not None and not self.kl_budget > 0:
            raise SPDError(f"kl_budget is {self.kl_budget}; give a number of nats above 0, or None for any")

    def reason(self, after: Drift) -> str | None:
        """Why to stop after a round; None to go on."""
        if self.on_rising_loss:
            for rise, what in (
                (after.loss_change, "the last round's"),
                (after.loss_change_in_all, "the first model's"),
            ):
                if rise.bounded and rise.low > 0:
                    return f"the aligned loss rose over {what} by {rise}"
        if self.kl_budget is not None and after.kl.value > self.kl_budget:
            return f"KL from the first model is {after.kl}, over the budget of {self.kl_budget:g} nats"
        return None


def overlap(a: Subspace, b: Subspace) -> float:
    """Mean over blocks of `tr(P_a P_b) / rank(a)`: 1 where `b` holds all of `a`, `rank(b) / width` by chance."""
    shares = []
    for site in a.sites:
        common = (a.bases[site].mT @ b.bases[site]).square().sum(dim=(1, 2))
        shares += [value / rank for value, rank in zip(common.tolist(), a.ranks[site], strict=True) if rank]
    return fmean(shares)


def drift_frame(drifts: Sequence[Drift]) -> pd.DataFrame:
    """One row per round; an estimate gives three columns."""
    rows = []
    for one in drifts:
        row: dict[str, Any] = {}
        for name, value in vars(one).items():
            if isinstance(value, Estimate):
                row |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            else:
                row[name] = value
        rows.append(row)
    return pd.DataFrame(rows)


def say(table: pd.DataFrame, stopped: str | None) -> str:
    """The rounds in sentences: how far each went, and why there are no more."""
    sentences = []
    for row in table.itertuples():
        change = Estimate(row.loss_change, row.loss_change_low, row.loss_change_high, 0, "")
        changed = f"{change.value:+.3f} [{change.low:.3f}, {change.high:.3f}] in this round, {verdict(change)}"
        sentences.append(
            f"Round {row.round}: aligned loss {row.aligned_loss:.3f} ({changed}), KL from "
            f"the first model {row.kl:.4f}, overlap with the first subspace {row.overlap:.2f} (halves of the examples "
            f"{row.overlap_of_halves:.2f}, chance {row.overlap_by_chance:.2f})."
        )
    sentences.append(f"Stopped: {stopped}." if stopped else "All rounds that were asked for were done.")
    return " ".join(sentences)
