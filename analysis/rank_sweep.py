"""What each rank costs and brings at a run's own layers, per head and joint, against random subspaces."""

from __future__ import annotations

from typing import Any

from spd_lens.config import SPDConfig

from .command import analysis, run
from .grid import PROJECTORS, Grid
from .inputs import Subject
from .layer_sweep import Budget, Generate, GridFile, Items, Random
from .recommend import KL_BUDGET
from .sweep_report import report

RANKS = [0.03125, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]


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
    """Ranks at the run's own layers and kinds, per head and joint, against random subspaces."""
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


if __name__ == "__main__":
    run(main)
