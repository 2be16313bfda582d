"""All engines by name: those in this package, those of installed plug-ins, and what a user registers."""

from __future__ import annotations

from typing import TypeVar

from spd_lens.errors import SPDError
from spd_lens.generation.engines.base import Engine
from spd_lens.registry import PlugIns
from spd_lens.settings import EngineSettings

_ENGINES: PlugIns[type[Engine]] = PlugIns("engine", "spd_lens.generation.engines")
_E = TypeVar("_E", bound=type[Engine])


def register(engine: _E) -> _E:
    """Class decorator: make an engine known by its name; `SPDError` for a name that is taken."""
    _ENGINES.register(engine)
    return engine


def find(name: str) -> type[Engine]:
    """The class of an engine by name; `SPDError` that lists the names if there is none."""
    return _ENGINES.find(name, _ENGINES.names())


def names() -> list[str]:
    """The names that `find` knows."""
    return _ENGINES.names()


def chosen(name: str | None, settings: EngineSettings | None) -> tuple[type[Engine], EngineSettings]:
    """The engine of that name, or else the one that the settings name, and its settings.

    Raises:
        SPDError: There is no such engine, it does not read a setting that is given, or these are no settings of one.
    """
    if not isinstance(settings, EngineSettings | None):
        raise SPDError(f"engine_settings is a {type(settings).__name__}; it must be spd_lens.settings.EngineSettings")
    settings = settings or EngineSettings.model_validate({})
    engine = find(name or settings.generation_engine)
    engine.check(settings)
    return engine, settings
