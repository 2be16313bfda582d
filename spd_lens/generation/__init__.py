"""The model's own completions under a projection, and the corpora that hold them."""

from spd_lens.generation.corpus import (
    NOT_APPLIED,
    Corpus,
    Header,
    Record,
    Streamed,
    corpus_digest,
    disk_errors_explained,
    recorded_settings,
    refuse_other_settings,
    settings_path,
)
from spd_lens.generation.engines import twin_engine
from spd_lens.generation.generate import check_room, generate
from spd_lens.generation.jobs import Decoding, Job, stop_tokens
from spd_lens.generation.model_settings import APPLIED, shown
from spd_lens.generation.sampling import Sampling

__all__ = [
    "APPLIED", "Corpus", "Decoding", "Header", "Job", "NOT_APPLIED", "Record", "Sampling", "Streamed", "check_room",
    "corpus_digest", "disk_errors_explained", "generate", "recorded_settings", "refuse_other_settings",
    "settings_path", "shown", "stop_tokens", "twin_engine",
]  # fmt: skip
