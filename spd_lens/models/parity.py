"""Whether two models agree: logits and KL divergence on short texts, with a tolerance for each dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from spd_lens.models.devices import dtype_name

CHECK_TEXTS = (
    "Tom has 12 apples and buys 30 more. How many apples does he have now? 12 + 30 = 42. The answer is 42.",
    "def add(a, b):\n    return a + b\n\nassert add(2, 3) == 5",
)
"""Two short texts of unequal length, so that right padding is part of what is compared."""

# Largest allowed difference of logits, relative to their spread, and mean KL in nats. What we saw, for SmolLM2-135M and
# for tiny random models of every architecture, is in docs/models.md, written from the tests' results.
# In half precision it is the KL that decides: of tens of thousands of logits one may well be off by half a spread, and
# a mixture of experts sends a token to another expert where two are all but equal, and then all of its logits differ.
# In float64 they differ as much as in float32: transformers computes norms and rotary angles in float32 all the same.
Tolerance = tuple[float, float]
TOLERANCE: dict[torch.dtype, Tolerance] = {
    torch.float64: (1e-4, 1e-7),
    torch.float32: (1e-3, 1e-5),
    torch.float16: (2.0, 5e-3),
    torch.bfloat16: (8.0, 2e-2),
}

WIDENED: Tolerance = (0.1, 1e-5)
"""For copies in float32 of models in half precision, whose rotary frequencies may have been rounded with them."""

Logits = Float[Tensor, "... d_vocab"]


@dataclass(frozen=True)
class Parity:
    """How far a model is from a reference model on the check texts."""

    logits: float
    """Largest absolute difference of logits over the standard deviation of the reference's logits."""
    kl: float
    """Mean over tokens of KL(reference || model), in nats."""

    @classmethod
    def between(cls, reference: Logits, model: Logits) -> Parity:
        """Compare logits that two models made of the same tokens."""
        gap = (reference - model).abs().max() / reference.std()
        return cls(logits=gap.item(), kl=kl_divergence(reference, model).mean().item())

    def within(self, allowed: torch.dtype | Tolerance) -> bool:
        """Whether logits and KL are within a tolerance, which may be given as a dtype."""
        logits, kl = _tolerance(allowed)
        return self.logits <= logits and self.kl <= kl  # false for NaN, as it should be

    def shifted(self, dtype: torch.dtype) -> bool:
        """Whether predictions agree although logits do not: a softmax does not see what is added to all logits."""
        logits, kl = TOLERANCE[dtype]
        return self.kl <= kl and self.logits > logits

    def against(self, allowed: torch.dtype | Tolerance) -> str:
        """A sentence part that says what was found and what is allowed."""
        logits, kl = _tolerance(allowed)
        where = f" in {dtype_name(allowed)}" if isinstance(allowed, torch.dtype) else ""
        return (
            f"logits differ by {self.logits:.2g} of their spread (allowed{where}: {logits:g}) and by a KL of "
            f"{self.kl:.2g} nats (allowed: {kl:g})"
        )


def _tolerance(allowed: torch.dtype | Tolerance) -> Tolerance:
    return TOLERANCE[allowed] if isinstance(allowed, torch.dtype) else allowed


def kl_divergence(p_logits: Logits, q_logits: Logits) -> Float[Tensor, "..."]:
    """KL(p || q) in nats at each position, from logits, in float32 or better."""
    wide = torch.promote_types(p_logits.dtype, torch.float32)
    log_p, log_q = F.log_softmax(p_logits.to(wide), dim=-1), F.log_softmax(q_logits.to(wide), dim=-1)
    # rounding can leave a sum of positive and negative terms a hair below zero
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp_min(0.0)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what was expected."""
    return ((found - expected).norm() / expected.norm()).item()
