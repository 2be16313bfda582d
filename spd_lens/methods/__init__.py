"""Ways to make a training corpus from a model's own outputs: SPD, what it is compared with, and its controls."""

from spd_lens.methods.base import Method
from spd_lens.methods.registry import get, names, register
from spd_lens.methods.workshop import Workshop

__all__ = ["Method", "Workshop", "get", "names", "register"]
