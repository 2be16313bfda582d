"""How low-rank are the gradients?"""

from spd_lens.analysis.spectra.figures import cumulative_figure, layers_figure
from spd_lens.analysis.spectra.measures import (
    ACTIVATIONS,
    GRADIENTS,
    SHUFFLED,
    effective_ranks,
    headline,
    rank_difference,
    spectrum,
)

__all__ = [
    "ACTIVATIONS", "GRADIENTS", "SHUFFLED", "cumulative_figure", "effective_ranks", "headline", "layers_figure",
    "rank_difference", "spectrum",
]  # fmt: skip
