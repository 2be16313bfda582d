"""All methods by name: those in this package, those of installed plug-ins, and what a user registers."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import re
from functools import cache
from typing import TypeVar

from spd_lens.errors import SPDError
from spd_lens.methods.base import Method
from spd_lens.registry import Registry

ENTRY_POINT = "spd_lens.methods"
"""Installed packages that name a module under this entry point have their methods found."""

_PACKAGE = __name__.rpartition(".")[0]
_METHODS: Registry[type[Method]] = Registry("method", "unknown method {name}; choose from {names}")
_M = TypeVar("_M", bound=type[Method])


def register(method: _M) -> _M:
    """Class decorator: make a method known by its name.

    Raises `SPDError` for a name that is taken, or that cannot be part of a path: studies name folders by it.
    """
    name = getattr(method, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise SPDError(f"method {method.__name__} has the name {name!r}; give it one of letters, digits and dashes")
    if not method.__module__.startswith(f"{_PACKAGE}."):
        _find_own()  # else a name of ours could be taken before we take it
    _METHODS.add(method)
    return method


def get(name: str) -> Method:
    """A method by name; `SPDError` that lists the names if there is none."""
    _discover()
    return _METHODS.find(name, names())()


def names() -> list[str]:
    """The methods that can be compared, those of the paper first."""
    _discover()
    return sorted(_METHODS, key=lambda name: (_METHODS[name].is_control, name))


@cache
def _find_own() -> None:
    for module in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__):
        importlib.import_module(f"{_PACKAGE}.{module.name}")


@cache
def _discover() -> None:
    _find_own()
    for plugin in importlib.metadata.entry_points(group=ENTRY_POINT):
        plugin.load()
