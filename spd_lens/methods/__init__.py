"""Ways to make a training corpus from a model's own outputs: SPD, what it is compared with, and its controls."""

from spd_lens.methods.base import Method
from spd_lens.methods.registry import get, names, register

__all__ = ["Method", "get", "names", "register"]
