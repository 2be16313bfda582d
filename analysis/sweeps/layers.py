"""Which layers and how much rank: every combination against random subspaces of its shape, and a recommendation.

`spd-lens analyze layer-sweep RUN` measures ranks × layers teacher-forced from one extraction, draws heat maps and rank
curves, recommends a cell or says that none stands out, and generates under the cells that it chose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spd_lens.analysis.common import Subject, analysis
from spd_lens.analysis.sweeps.grid import Grid
from spd_lens.analysis.sweeps.recommend import KL_BUDGET
from spd_lens.analysis.sweeps.report import report

GridFile = Annotated[Path | None, typer.Option("--grid", help="YAML file with the grid; see docs/ablation.md.")]
Items = Annotated[int | None, typer.Option("--items", help="Held-out items, instead of the grid's.")]
Random = Annotated[
    int | None, typer.Option("--random", help="Random subspaces beside each cell, instead of the grid's.")
]
Budget = Annotated[float, typer.Option("--kl-budget", help="Largest KL of a recommended cell, in nats per token.")]
Generate = Annotated[bool, typer.Option("--generate/--no-generate", help="Also generate under the chosen cells.")]


@analysis()
def main(
    subject: Subject,
    *,
    grid: GridFile = None,
    items: Items = None,
    random: Random = None,
    kl_budget: Budget = KL_BUDGET,
    generate: Generate = True,
) -> None:
    """Ranks × layers against random subspaces; recommends layers and rank."""
    chosen = Grid.read(grid, n_items=items, n_random=random)
    report("layer_sweep", subject, chosen, kl_budget=kl_budget, generate=generate)
