"""Distilling a corpus into the model: LoRA or full fine-tuning that can be interrupted (paper section 3.4, Eq. 14)."""

from spd_lens.training.distillation import ATTENTION, TrainingSettings, check_targets, finetune

__all__ = ["ATTENTION", "TrainingSettings", "check_targets", "finetune"]
