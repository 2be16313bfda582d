"""What each rank costs and brings at a run's own layers, per head and joint, against random subspaces."""

from __future__ import annotations

from typing import Any

from spd_lens.config import SPDConfig
from spd_lens.console import set_up_logging, single_command, start

from .grid import PROJECTORS, Grid
from .inputs import subjects
from .layer_sweep import Budget, Generate, GridFile, Items, Quiet, Random, RunPaths
from .recommend import KL_BUDGET
from .sweep_report import report

RANKS = [0.03125, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]


def main(
    runs: RunPaths,
    grid: GridFile = None,
    items: Items = None,
    random: Random = None,
    kl_budget: Budget = KL_BUDGET,
    generate: Generate = True,
    quiet: Quiet = False,
) -> None:
    """Ranks at the run's own layers and kinds, per head and joint, against random subspaces."""
    set_up_logging(quiet)
    for subject in subjects(runs, progress=not quiet):
        chosen = Grid.read(grid, own_layers(subject.run.config), n_items=items, n_random=random)
        report("rank_sweep", subject, chosen, kl_budget=kl_budget, generate=generate)


def own_layers(config: SPDConfig) -> dict[str, Any]:
    """The grid of a run's own layers and kinds at nine ranks."""
    return {
        "ranks": RANKS,
        "layers": [config.layers],
        "kinds": ["+".join(config.kinds)],
        "projectors": list(PROJECTORS),
    }


app = single_command(main)

if __name__ == "__main__":
    start(app, on_interrupt="what it had saved stays")
