"""What a sweep has measured: every item under every cell and its controls, kept cell by cell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spd_lens.analysis.common import LOSS_FIELDS, JsonFolder, Values, known
from spd_lens.analysis.sweeps.grid import GridCell
from spd_lens.errors import UNREADABLE, SPDError
from spd_lens.evaluation import OUTCOMES

OTHER_TEXT = "other_text_kl"
FORCED = (*LOSS_FIELDS, "kl")
MEASURES = {field: OUTCOMES[field] for field in FORCED} | {OTHER_TEXT: "KL from base, other text"}
"""What can be measured of each cell, in nats per token: of the gold completion, of some of its tokens, or of texts that
have nothing to do with the task."""
_ALWAYS = ("aligned_loss", "kl", "completion_loss")
"""What every sweep has measured, however old."""


@dataclass(frozen=True)
class Measured:
    """What one cell and its controls did to every item."""

    cell: GridCell
    ranks: tuple[int, ...]
    """Directions that were kept, for each block of each site in turn; fewer than asked if the gradients had fewer."""
    own: Values
    random: list[Values]

    def change(self, base: Values, measure: str) -> Float[np.ndarray, " item"]:
        """Change of each item that has the measure from the base model, in nats."""
        return known(self.own[measure] - base[measure], base[measure])

    def random_change(self, base: Values, measure: str) -> Float[np.ndarray, "draw item"]:
        """The same under each random subspace."""
        return known(np.stack([values[measure] for values in self.random]) - base[measure], base[measure])


class Store(JsonFolder):
    """Finished cells, and the base model."""

    what = "a sweep"

    def __init__(self, folder: Path | None, n_items: int) -> None:
        super().__init__(folder)
        self._n_items = n_items

    @property
    def base(self) -> Values:
        """The items under the base model."""
        with self._reading("base"):
            return _arrays(self.read("base"))

    @base.setter
    def base(self, values: Values) -> None:
        self.write("base", _lists(values))

    def put(self, measured: Measured) -> None:
        """Keep a cell."""
        record = {"own": _lists(measured.own), "random": [_lists(r) for r in measured.random]}
        self.write(measured.cell.name, {"ranks": list(measured.ranks), **record})

    def get(self, cell: GridCell) -> Measured:
        """A cell that was kept; `SPDError` if its file is damaged."""
        record = self.read(cell.name)
        with self._reading(cell.name):
            own, random = _arrays(record["own"]), [_arrays(r) for r in record["random"]]
            held_out = (array for each in (own, *random) for name, array in each.items() if name != OTHER_TEXT)
            if any(len(array) != self._n_items for array in held_out):
                raise ValueError("another number of items")
            return Measured(cell, tuple(record["ranks"]), own, random)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except UNREADABLE as error:
            raise SPDError(f"{self.path(name)} is damaged ({error!r}); remove it to measure it again") from error


def _lists(arrays: Values) -> dict[str, list[float | None]]:
    return {name: [None if x != x else x for x in array.tolist()] for name, array in arrays.items()}


def _arrays(record: Mapping[str, Any]) -> Values:
    return {name: np.array(record[name], dtype=float) for name in MEASURES if name in record or name in _ALWAYS}
