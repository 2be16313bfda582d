"""How does the subspace after distillation differ from the one before?"""

from spd_lens.analysis.distilled.absorption import absorbed, absorption, absorption_figure, absorption_sentence
from spd_lens.analysis.distilled.drift import (
    drift,
    drift_figure,
    drift_sentence,
    moments_after,
    spectra_before_after,
    spectra_figure,
)

__all__ = [
    "absorbed", "absorption", "absorption_figure", "absorption_sentence", "drift", "drift_figure", "drift_sentence",
    "moments_after", "spectra_before_after", "spectra_figure",
]  # fmt: skip
