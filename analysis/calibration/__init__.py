"""How many calibration examples does a subspace need, and what spoils it?"""

from spd_lens.analysis.calibration.faults import (
    faults_figure,
    faults_sentence,
    misplaced_spans,
    sensitivity,
    wrong_answers,
)
from spd_lens.analysis.calibration.losses import losses_figure, losses_under
from spd_lens.analysis.calibration.size import stability, stability_figure, stability_sentence

__all__ = [
    "faults_figure", "faults_sentence", "losses_figure", "losses_under", "misplaced_spans", "sensitivity",
    "stability", "stability_figure", "stability_sentence", "wrong_answers",
]  # fmt: skip
