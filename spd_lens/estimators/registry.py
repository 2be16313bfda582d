"""All estimators by name: those in this package, those of installed plug-ins, and what a user registers."""

from __future__ import annotations

from typing import TypeVar

from spd_lens.estimators.base import Estimator
from spd_lens.registry import PlugIns

_ESTIMATORS: PlugIns[type[Estimator]] = PlugIns("estimator", "spd_lens.estimators")
_E = TypeVar("_E", bound=type[Estimator])


def register(estimator: _E) -> _E:
    """Class decorator: make an estimator known by its name.

    Raises `SPDError` for a name that is taken, or that cannot be part of a path.
    """
    _ESTIMATORS.register(estimator)
    return estimator


def get(name: str) -> Estimator:
    """An estimator by name; `SPDError` that lists the names if there is none."""
    estimator: Estimator = _ESTIMATORS.make(name)
    return estimator


def names() -> list[str]:
    """The names that `get` knows, those of controls last."""
    return _ESTIMATORS.names()
