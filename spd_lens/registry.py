"""`Registry`: classes by the name that each gives itself. A name is taken once, and an unknown one is refused."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import pkgutil
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from spd_lens.errors import SPDError

_Class = TypeVar("_Class", bound=type)


class Registry(dict[str, _Class]):
    """A mapping from names to classes.

    Args:
        noun: What the classes are called in messages, such as `"task"`.
        unknown: The message for a name that no class has; `{name}`, `{guess}` (a similar name) and `{names}` are
            filled in.
    """

    def __init__(self, noun: str, unknown: str) -> None:
        super().__init__()
        self.noun, self.unknown = noun, unknown

    def add(self, item: _Class) -> None:
        """Make a class known by its `name`. The same class once more is no second one: notebook cells are run again.

        Raises `SPDError` for a name that another class has.
        """
        name = item.name  # type: ignore[attr-defined]  # every class that is registered has one
        known = self.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (item.__module__, item.__qualname__):
            article = "an" if self.noun[0] in "aeiou" else "a"
            raise SPDError(f"there is already {article} {self.noun} called {name!r}; give yours another name")
        self[name] = item

    def find(self, name: str, names: Iterable[str]) -> _Class:
        """The class of that name; `SPDError` with the names that there are if there is none."""
        if name not in self:
            listed = [*names]
            guess = did_you_mean(name, listed)
            raise SPDError(self.unknown.format(name=repr(name), guess=guess, names=", ".join(listed)))
        return self[name]


class PlugIns(Registry[_Class]):
    """Classes with a `name`: those in the files of a package, in installed plug-ins, and a user's own.

    A class may say with `is_control` that it is only there to be compared with.

    Args:
        noun: What the classes are called in messages, such as `"method"`.
        package: The package whose files are imported when a name is first asked for. Installed packages that name a
            module under an entry point of this name have its classes found, too.
    """

    def __init__(self, noun: str, package: str) -> None:
        super().__init__(noun, f"unknown {noun} {{name}}; choose from {{names}}")
        self.package, self.complete = package, False

    def register(self, item: _Class) -> _Class:
        """Make a class known by its name.

        Raises `SPDError` for a name that is taken, or that cannot be part of a path: folders are named by it.
        """
        name = getattr(item, "name", None)
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise SPDError(
                f"{self.noun} {item.__name__} has the name {name!r}; give it one of letters, digits and dashes"
            )
        if not item.__module__.startswith(f"{self.package}."):
            self._find_own()  # else a name of ours could be taken before we take it
        self.add(item)
        return item

    def make(self, name: str) -> Any:
        """An object of the class of that name; `SPDError` that lists the names if there is none."""
        return self.find(name, self.names())()

    def names(self) -> list[str]:
        """The names that there are, those of controls last."""
        if not self.complete:
            self._find_own()
            for plugin in importlib.metadata.entry_points(group=self.package):
                plugin.load()
            self.complete = True
        return sorted(self, key=lambda name: (getattr(self[name], "is_control", False), name))

    def _find_own(self) -> None:
        for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
            importlib.import_module(f"{self.package}.{module.name}")


def did_you_mean(word: str, known: list[str]) -> str:
    """A similar word that is known, as the end of a sentence; nothing where none is similar."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
