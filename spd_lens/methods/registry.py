"""All methods by name: those in this package, those of installed plug-ins, and what a user registers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from spd_lens.methods.base import Method
from spd_lens.registry import PlugIns

_METHODS: PlugIns[type[Method]] = PlugIns("method", "spd_lens.methods")
_M = TypeVar("_M", bound=type[Method])
_Family = TypeVar("_Family", bound=Callable[[], Iterable[type[Method]]])
_FAMILIES: list[Callable[[], Iterable[type[Method]]]] = []


def register(method: _M) -> _M:
    """Class decorator: make a method known by its name.

    Raises `SPDError` for a name that is taken, or that cannot be part of a path: studies name folders by it.
    """
    _METHODS.register(method)
    return method


def family(make: _Family) -> _Family:
    """Decorator of a function that gives methods, and is asked for them whenever a method is looked for.

    A method that was registered under one of their names stays.
    """
    _FAMILIES.append(make)
    return make


def get(name: str) -> Method:
    """A method by name; `SPDError` that lists the names if there is none."""
    names()
    method: Method = _METHODS.make(name)
    return method


def names() -> list[str]:
    """The methods that can be compared, those of controls last."""
    _METHODS.names()  # which finds the families
    for make in _FAMILIES:
        for method in make():
            _METHODS.setdefault(method.name, method)
    return _METHODS.names()
