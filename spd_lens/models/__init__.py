"""Models: a Hugging Face twin, its TransformerLens counterpart, and the weights between them."""

from spd_lens.models.pair import ModelPair, load

__all__ = ["ModelPair", "load"]
