"""Do two subspaces hold each other's gradients?"""

from spd_lens.analysis.overlap.command import overlap_sentence
from spd_lens.analysis.overlap.energy import energy_overlap, permutation_test
from spd_lens.analysis.overlap.figures import energy_figure, exchange_figure, heat_map_figure
from spd_lens.analysis.overlap.transfer import transfer, transfer_figure, transfer_sentence

__all__ = [
    "energy_figure", "energy_overlap", "exchange_figure", "heat_map_figure", "overlap_sentence", "permutation_test",
    "transfer", "transfer_figure", "transfer_sentence",
]  # fmt: skip
