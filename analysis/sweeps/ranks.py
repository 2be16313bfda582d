"""What each rank costs and brings at a run's own layers, per head and joint, against random subspaces."""

from __future__ import annotations

from typing import Any

from spd_lens.analysis.common import Subject, analysis
from spd_lens.analysis.sweeps.grid import PROJECTORS, Grid
from spd_lens.analysis.sweeps.layers import Budget, Generate, GridFile, Items, Random
from spd_lens.analysis.sweeps.recommend import KL_BUDGET
from spd_lens.analysis.sweeps.report import report
from spd_lens.runs import SPDConfig

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
