"""All methods by name: those in this package, those of installed plug-ins, and what a user registers."""

from __future__ import annotations

from typing import TypeVar

from spd_lens.methods.base import Method
from spd_lens.registry import PlugIns

_METHODS: PlugIns[type[Method]] = PlugIns("method", "spd_lens.methods")
_M = TypeVar("_M", bound=type[Method])


def register(method: _M) -> _M:
    """Class decorator: make a method known by its name.

    Raises `SPDError` for a name that is taken, or that cannot be part of a path: studies name folders by it.
    """
    _METHODS.register(method)
    return method


def get(name: str) -> Method:
    """A method by name; `SPDError` that lists the names if there is none."""
    method: Method = _METHODS.make(name)
    return method


def names() -> list[str]:
    """The methods that can be compared, those of the paper first."""
    return _METHODS.names()
