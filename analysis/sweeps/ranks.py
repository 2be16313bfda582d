"""What each rank costs and brings at a run's own layers, per head and joint, against random subspaces."""

from __future__ import annotations

from typing import Any

from spd_lens.analysis.sweeps.grid import PROJECTORS
from spd_lens.analysis.sweeps.report import command
from spd_lens.runs import SPDConfig

RANKS = [0.03125, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]


def own_layers(config: SPDConfig) -> dict[str, Any]:
    """The grid of a run's own layers and kinds at nine ranks."""
    return {
        "ranks": RANKS,
        "layers": [config.layers],
        "kinds": ["+".join(config.kinds)],
        "projectors": list(PROJECTORS),
    }


main = command(
    "rank_sweep", "Ranks at the run's own layers and kinds, per head and joint, against random subspaces.", own_layers
)
