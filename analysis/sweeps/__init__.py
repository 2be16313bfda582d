"""What do ranks, layers, kinds and heads cost and bring, against random subspaces?"""

from spd_lens.analysis.sweeps.engine import measure, sweep
from spd_lens.analysis.sweeps.figures import heat_map, rank_curves, trade_off
from spd_lens.analysis.sweeps.grid import Grid, GridCell
from spd_lens.analysis.sweeps.recommend import KL_BUDGET, overall, recommend

__all__ = [
    "Grid", "GridCell", "KL_BUDGET", "heat_map", "measure", "overall", "rank_curves", "recommend", "sweep",
    "trade_off",
]  # fmt: skip
