"""Scores and teacher-forced effects of the base, the projected and the fine-tuned policy, on the same items."""

from spd_lens.evaluation.forced import ForcedItem, teacher_forced
from spd_lens.evaluation.results import EvalResult, ItemResult
from spd_lens.evaluation.scores import evaluate
from spd_lens.policy import Policy

__all__ = ["EvalResult", "ForcedItem", "ItemResult", "Policy", "evaluate", "teacher_forced"]
