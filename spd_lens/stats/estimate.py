"""`Estimate`: a number that carries its interval wherever it goes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Estimate:
    """A number with its interval. Prints as `0.42 [0.33, 0.51] (n=100)`."""

    value: float
    low: float
    """Lower end; `-inf` where the data allow no interval."""
    high: float
    """Upper end; `inf` where the data allow no interval."""
    n: int
    """Independent units the interval rests on: items, or seeds."""
    method: str
    """How the interval was made, with its confidence, and what was fallen back on."""

    @property
    def bounded(self) -> bool:
        """Whether there is an interval at all."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def interval(self) -> str:
        """The value and its interval without the number of units: `0.42 [0.33, 0.51]`."""
        if not self.bounded:
            return f"{_number(self.value, decimals(abs(self.value)))} [no interval]"
        places = decimals(self.high - self.low)
        value, low, high = (_number(x, places) for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"

    def __str__(self) -> str:
        return f"{self.interval} (n={self.n})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no infinity: missing ends are `None`."""
        record = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}

    def to_row(self) -> dict[str, Any]:
        """`value`, `low`, `high` and `n`, the columns of an estimate in a table; missing ends are `None`."""
        record = self.to_dict()
        del record["method"]
        return record


def bracketed(value: float, low: float, high: float, places: int = 3, sign: str = "") -> str:
    """`0.423 [0.331, 0.512]` with a fixed number of decimals; the value alone where the ends are missing.

    With `sign="+"` positive numbers have a sign too.
    """
    text = f"{value:{sign}.{places}f}"
    missing = low is None or math.isnan(low)
    return text if missing else f"{text} [{low:{sign}.{places}f}, {high:{sign}.{places}f}]"


def decimals(width: float) -> int:
    """Decimals that show two significant digits of a width, at least 2."""
    if not width > 0 or not math.isfinite(width):
        return 2
    return min(9, max(2, 1 - math.floor(math.log10(width))))


def _number(x: float, places: int) -> str:
    text = f"{x:.{places}f}"
    return text.lstrip("-") if float(text) == 0 else text  # no "-0.00"
