"""What was predicted before, and what became of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import ConfigDict, Field, field_validator

from spd_lens import estimators
from spd_lens.analysis.estimators.settings import RANDOM
from spd_lens.analysis.estimators.tables import ACCURACY
from spd_lens.evaluation import OUTCOMES
from spd_lens.registry import did_you_mean
from spd_lens.runs import read_yaml, validated
from spd_lens.settings import Settings

HELD, FAILED, OPEN = "held", "did not hold", "cannot be told"


class Prediction(Settings):
    """One claim on one difference."""

    model_config = ConfigDict(protected_namespaces=(), allow_inf_nan=False)

    claim: str = Field(min_length=1, description="The claim in words.")
    estimator: str = Field(description="The estimator that it is about.")
    against: Literal["paper", "random"] = Field(description="What it is compared with.")
    outcome: str = Field(description="results_loss, copies_loss, ..., or accuracy, of greedy answers")
    direction: Literal["lower", "higher", "same"] = Field(description="Where the outcome lies.")
    margin: float = Field(0.05, gt=0, description="Differences within it are the same, in the outcome's unit.")
    span: str | None = Field(None, description="Only with calibration examples of this span; null: of any.")
    rank: int | float | None = Field(None, description="Only at this rank; null: at any.")
    model: str | None = Field(None, description="Only in places of this model; null: in any.")
    task: str | None = Field(None, description="Only in places of this task; null: in any.")

    @field_validator("estimator")
    @classmethod
    def _known_estimator(cls, value: str) -> str:
        estimators.get(value)
        if value == RANDOM:
            raise ValueError("random subspaces are what others are compared with; name another estimator")
        return value

    @field_validator("rank")
    @classmethod
    def _as_in_tables(cls, value: int | float | None) -> int | float | None:
        """A number of directions is whole."""
        return int(value) if value is not None and value > 1 else value

    @field_validator("outcome")
    @classmethod
    def _known_outcome(cls, value: str) -> str:
        if value not in (known := [*OUTCOMES, ACCURACY]):
            listed = did_you_mean(value, known) or f"; choose from {', '.join(known)}"
            raise ValueError(f"unknown outcome {value!r}{listed}")
        return value

    def of(self, row: Any) -> str:
        """What one difference says: a claim holds or fails where the interval or the corrected test says so.

        `same` holds where the whole 95 % interval lies within the margin, and fails where a difference is shown that
        does not. A direction holds where it is shown, and fails where the other one is, or where the two are the same.
        """
        same = -self.margin <= row.low and row.high <= self.margin
        if self.direction == "same":
            return HELD if same else FAILED if row.shown else OPEN
        if row.shown:
            return HELD if row.shown == self.direction else FAILED
        return FAILED if same else OPEN

    def judged(self, table: pd.DataFrame) -> Iterator[dict[str, Any]]:
        """The outcome in each place that it is about: `held` or `did not hold` where all differences there agree."""
        chosen = (table.estimator == self.estimator) & (table.against == self.against) & (table.outcome == self.outcome)
        for name in ("span", "rank"):
            if (wanted := getattr(self, name)) is not None:
                chosen &= table[name] == str(wanted)
        for (place, model, task), part in table.groupby(["place", "model", "task"], sort=False):
            if self.model not in (None, model) or self.task not in (None, task):
                continue
            found = [self.of(row) for row in part[chosen.loc[part.index]].itertuples()]
            said = {HELD: found.count(HELD), FAILED: found.count(FAILED), OPEN: found.count(OPEN)}
            agreed = found[0] if len(set(found)) == 1 else OPEN
            why = ", ".join(f"{n} {name}" for name, n in said.items() if n) or "it was not measured here"
            yield {"claim": self.claim, "place": place, "outcome": agreed, "of": why}


class Predictions(Settings):
    """What was predicted, and when."""

    written: date = Field(description="The day on which the predictions were written.")
    predictions: list[Prediction] = Field(min_length=1, description="The claims.")

    @classmethod
    def read(cls, path: str | Path) -> Predictions:
        """The predictions of a YAML file; `SPDError` names the first wrong entry in a sentence."""
        return validated(cls, read_yaml(path))

    def judged(self, table: pd.DataFrame) -> list[dict[str, Any]]:
        """Every claim in every place that it is about; one that is about none of them says so."""
        rows = []
        for one in self.predictions:
            none = {"claim": one.claim, "place": "", "outcome": OPEN, "of": "no place has this model and task"}
            rows += list(one.judged(table)) or [none]
        return rows


def sha256(path: Path) -> str:
    """The digest of a file, by which a reader knows that it was not changed since."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
