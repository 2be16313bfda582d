"""Tables of text: in Markdown for files, and in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Column, Table


def markdown(head: Sequence[str], rows: Iterable[Iterable[object]], align: str = "---") -> list[str]:
    """The lines of a Markdown table.

    Args:
        head: The columns' names.
        rows: Cells, written as they are: what may hold `|` has to be escaped before.
        align: Rule under every column but the first, which is aligned to the left: `---:` aligns to the right.
    """
    lines = [head, ["---", *[align] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def terminal(head: Iterable[str | Column], rows: Iterable[Iterable[RenderableType]], **options: Any) -> Table:
    """A table for a rich console; `options` are those of `rich.table.Table`, such as `title`."""
    table = Table(*head, **options)
    for row in rows:
        table.add_row(*row)
    return table
