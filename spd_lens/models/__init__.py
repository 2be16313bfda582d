"""Models: a Hugging Face twin, its TransformerLens counterpart, and the weights between them."""

from spd_lens.models.loading import load
from spd_lens.models.pair import ModelPair

__all__ = ["ModelPair", "load"]
