"""Intervals, paired comparisons and corrections for many of them."""

from spd_lens.stats.contrasts import CrossedDifference, crossed_difference, crossed_differences
from spd_lens.stats.corrections import holm, sign_flip
from spd_lens.stats.estimate import Estimate, bracketed
from spd_lens.stats.finding import BASE, CALIBRATION, EQUAL_DAMAGE, GOOD, HELD_OUT, RANDOM, Finding, corrected
from spd_lens.stats.grading import Grade, Level, grade
from spd_lens.stats.intervals import (
    MIN_BOOTSTRAP,
    TOO_FEW,
    WITHIN_NOISE,
    McNemar,
    SeedSummary,
    bootstrap_ends,
    clustered_difference,
    clustered_mean,
    difference_sentence,
    mcnemar_exact,
    mean_interval,
    paired_difference,
    score_interval,
    seed_summary,
    verdict,
    within_noise,
)

__all__ = [
    "BASE", "CALIBRATION", "CrossedDifference", "EQUAL_DAMAGE", "Estimate", "Finding", "GOOD", "Grade", "HELD_OUT",
    "Level", "MIN_BOOTSTRAP", "McNemar", "RANDOM", "SeedSummary", "TOO_FEW", "WITHIN_NOISE", "bootstrap_ends",
    "bracketed", "clustered_difference", "clustered_mean", "corrected", "crossed_difference", "crossed_differences",
    "difference_sentence", "grade", "holm", "mcnemar_exact", "mean_interval", "paired_difference", "score_interval",
    "seed_summary", "sign_flip", "verdict", "within_noise",
]  # fmt: skip
