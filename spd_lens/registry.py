"""`Registry`: classes by the name that each gives itself. A name is taken once, and an unknown one is refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeVar

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
            raise SPDError(f"there is already a {self.noun} called {name!r}; give yours another name")
        self[name] = item

    def find(self, name: str, names: Iterable[str]) -> _Class:
        """The class of that name; `SPDError` with the names that there are if there is none."""
        if name not in self:
            listed = [*names]
            guess = did_you_mean(name, listed)
            raise SPDError(self.unknown.format(name=repr(name), guess=guess, names=", ".join(listed)))
        return self[name]


def did_you_mean(word: str, known: list[str]) -> str:
    """A similar word that is known, as the end of a sentence; nothing where none is similar."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
