"""Ways to choose what is kept of the keys and values: the paper's top gradient directions, and others by name."""

from spd_lens.estimators.base import Calibration, Estimator, Shape, Source
from spd_lens.estimators.registry import get, names, register

__all__ = ["Calibration", "Estimator", "Shape", "Source", "get", "names", "register"]
