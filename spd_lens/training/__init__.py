"""Distilling a corpus into the model: LoRA or full fine-tuning that can be interrupted (paper section 3.4, Eq. 14)."""

from spd_lens.training.checkpoint_dir import is_finished
from spd_lens.training.finetune import finetune
from spd_lens.training.lora_targets import ATTENTION, resolve_targets
from spd_lens.training.reports import trackers
from spd_lens.training.rows import scored_padding

__all__ = ["ATTENTION", "finetune", "is_finished", "resolve_targets", "scored_padding", "trackers"]
