"""What analyses share: runs as subjects, the look of figures, measures between subspaces, intervals."""

from spd_lens.analysis.common.against_random import Contrast, beside_random, contrasts, matched_draws
from spd_lens.analysis.common.agreements import ENERGY, MEASURES, agreement
from spd_lens.analysis.common.angles import (
    beside_null,
    cosine_by_rank,
    energy_by_rank,
    energy_share,
    entropy_rank,
    mean_squared_cosine,
    p_value,
    participation_ratio,
    principal_angles,
    random_bases,
    stable_rank,
)
from spd_lens.analysis.common.command import Findings, Quiet, analysis
from spd_lens.analysis.common.estimated import Estimated
from spd_lens.analysis.common.jackknife import around, filled, half_width, halves, sets, shard_grams, summed
from spd_lens.analysis.common.outcomes import LOSS_FIELDS, Values, by_item, deciding, in_words, known
from spd_lens.analysis.common.printed import (
    ABLATED,
    CODE_MATH_QA,
    FIGURE_4,
    FIGURE_4_SIZES,
    LABELS,
    LOSSES,
    QA_MATH_CODE,
    SOURCE_OF,
    STAND_FOR,
    TABLES,
    PaperTable,
    Row,
)
from spd_lens.analysis.common.report_html import html_of
from spd_lens.analysis.common.store import JsonFolder
from spd_lens.analysis.common.style import (
    COLORS,
    DASHES,
    DIVERGING,
    NULL_COLOR,
    PACKAGE,
    SEQUENTIAL,
    SYMBOLS,
    as_data,
    band,
    bars,
    drawn,
    figure,
    line,
    listed,
    log_axis,
    middle_and_range,
    page,
    panel,
    panel_for_each,
    panels,
    plain,
)
from spd_lens.analysis.common.subject import Subject, place, spectrum_note, subjects
from spd_lens.analysis.common.token_text import context, pieces_of, spelled, tokens_of
from spd_lens.analysis.common.word_diff import Piece, word_diff

__all__ = [
    "ABLATED", "CODE_MATH_QA", "FIGURE_4", "FIGURE_4_SIZES", "LABELS", "LOSSES", "PaperTable", "QA_MATH_CODE", "Row",
    "SOURCE_OF", "STAND_FOR", "TABLES", "html_of",
    "LOSS_FIELDS", "Values", "by_item", "deciding", "in_words", "known", "JsonFolder",
    "COLORS", "Contrast", "DASHES", "DIVERGING", "ENERGY", "Estimated", "Findings", "MEASURES", "NULL_COLOR", "PACKAGE",
    "Piece", "Quiet", "SEQUENTIAL", "SYMBOLS", "Subject", "agreement", "analysis", "around", "as_data", "band", "bars",
    "beside_null", "beside_random", "context", "contrasts", "cosine_by_rank", "drawn", "energy_by_rank", "energy_share",
    "entropy_rank", "figure", "filled", "half_width", "halves", "line", "listed", "log_axis", "matched_draws",
    "mean_squared_cosine", "middle_and_range", "p_value", "page", "panel", "panel_for_each", "panels",
    "participation_ratio", "pieces_of", "place", "plain", "principal_angles", "random_bases", "sets",
    "shard_grams", "spectrum_note", "spelled", "stable_rank", "subjects", "summed", "tokens_of", "word_diff",
]  # fmt: skip
