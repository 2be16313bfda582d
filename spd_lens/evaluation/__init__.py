"""Scores and teacher-forced effects of the base, the projected and the fine-tuned policy, on the same items."""

from spd_lens.evaluation.corpus_diagnostics import (
    OF_COMPLETIONS,
    corpus_diagnostics,
    degeneration,
    repeated_ngrams,
    settled_at,
    share_after_answer,
)
from spd_lens.evaluation.evaluate import evaluate
from spd_lens.evaluation.matching import KL_TOLERANCE, all_at_equal_kl, at_equal_kl
from spd_lens.evaluation.outcomes import NEUTRAL, OUTCOMES, SAYS, fitting, other_texts, with_answer_only
from spd_lens.evaluation.published import (
    LOSS_TASKS,
    Baseline,
    Format,
    Measured,
    Subject,
    known_as,
    models_published,
    own_names,
    published,
    warning,
)
from spd_lens.evaluation.results import EvalResult, ItemResult
from spd_lens.evaluation.teacher_forced import ForcedBatch, ForcedItem, ForcedPasses, per_item, teacher_forced
from spd_lens.subspaces import Policy

__all__ = [
    "Baseline", "EvalResult", "ForcedBatch", "ForcedItem", "ForcedPasses", "Format", "ItemResult", "KL_TOLERANCE",
    "LOSS_TASKS", "Measured", "NEUTRAL", "OF_COMPLETIONS", "OUTCOMES", "Policy", "SAYS", "Subject", "all_at_equal_kl",
    "at_equal_kl", "corpus_diagnostics", "degeneration", "evaluate", "fitting", "known_as", "models_published",
    "other_texts", "own_names", "per_item", "published", "repeated_ngrams", "settled_at", "share_after_answer",
    "teacher_forced", "warning", "with_answer_only",
]  # fmt: skip
