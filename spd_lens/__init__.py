"""Self-Policy Distillation (arXiv 2605.22675) for TransformerLens.

Find the low-rank K/V subspace that a model's correctness gradients live in, look at it, apply it as hooks or as
weights, distil it, and measure what it did.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
