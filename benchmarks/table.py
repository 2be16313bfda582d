"""What a benchmark prints and writes: one row per comparison, with its target and, where there is one, its bound."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Row:
    """One comparison. `value` is a ratio unless its unit says otherwise."""

    stage: str
    """One of `benchmarks.run.STAGES`."""
    model: str
    dtype: str
    """Ours, or `ours / the peer's` where they differ."""
    what: str
    """What is compared with what, in words."""
    value: float
    """Median over rounds."""
    low: float
    high: float
    """Lowest and highest round."""
    target: float | None = None
    at_least: bool = True
    """Whether the target is a lower limit; otherwise an upper one."""
    unit: str = "x"
    bound: str = ""
    """What the hardware would allow, where that was measured in the same run."""
    ours: str = ""
    peer: str = ""
    """Throughput or size of each, with its unit."""
    note: str = ""
    points: Sequence[Sequence[float]] = ()
    """Of a curve: size and measurement at each of its points."""

    @classmethod
    def of(cls, stage: str, model: str, dtype: str, what: str, rounds: Sequence[float], **options: Any) -> Row:
        """The row of what several rounds, or a single one, found."""
        return cls(stage, model, dtype, what, statistics.median(rounds), min(rounds), max(rounds), **options)

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the table."""
    table = Table(title="ratios: median [lowest, highest round]", show_lines=False)
    for column in ("", "stage", "model", "dtype", "comparison", "ratio", "target", "bound", "ours", "peer"):
        table.add_column(column, overflow="fold")
    marks = {True: Text("met", "green"), False: Text("short", "bold red"), None: Text("-")}
    for row in rows:
        target = "" if row.target is None else f"{'≥' if row.at_least else '≤'} {row.target:g}"
        value = f"{row.value:.2f}{'' if row.unit in ('x', '') else ' ' + row.unit} [{row.low:.2f}, {row.high:.2f}]"
        what = f"{row.what} ({row.note})" if row.note else row.what
        table.add_row(
            marks[row.met], row.stage, row.model, row.dtype, what, value, target, row.bound, row.ours, row.peer
        )
    console.print(table)


def write(rows: Sequence[Row], facts: dict[str, Any], path: Path) -> None:
    """Write the rows as JSON, with the facts about the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**facts, "rows": [{**asdict(row), "met": row.met} for row in rows]}
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
