"""Numbers that a caller gives: numpy's and torch's scalars are numbers, truth values are no counts."""

from __future__ import annotations

from typing import Any

from spd_lens.errors import SPDError


def plain(value: Any) -> Any:
    """Scalars and arrays of numpy and torch as Python's own numbers and lists; anything else as it is.

    JSON, seeds and comparisons of types take nothing else. Lists, tuples and dictionaries are gone through.
    """
    if type(value) in (list, tuple):
        return type(value)(plain(part) for part in value)
    if type(value) is dict:
        return {plain(key): plain(part) for key, part in value.items()}
    return value.tolist() if hasattr(value, "ndim") and hasattr(value, "tolist") else value


def whole(name: str, value: Any, least: int | None = 1) -> int:
    """A whole number as Python's own `int`, of at least `least` if that is given.

    Raises:
        SPDError: it is no whole number (a truth value is none, nor is 3.0), or too small.
    """
    number = plain(value)
    if type(number) is not int or (least is not None and number < least):
        rule = "a whole number" if least is None else f"a whole number of at least {least}"
        raise SPDError(f"{name} is {number!r}; it must be {rule}")
    return number
