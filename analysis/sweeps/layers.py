"""Which layers and how much rank: every combination against random subspaces of its shape, and a recommendation.

`spd-lens analyze layer-sweep RUN` measures ranks × layers teacher-forced from one extraction, draws heat maps and rank
curves, recommends a cell or says that none stands out, and generates under the cells that it chose.
"""

from spd_lens.analysis.sweeps.report import command

main = command("layer_sweep", "Ranks × layers against random subspaces; recommends layers and rank.", lambda _: {})
