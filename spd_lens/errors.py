"""The one exception type a user of the library has to know, and the numbers that a caller gives."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any


class SPDError(Exception):
    """A mistake in the input or the set-up.

    The message is one sentence or two: what is wrong, with the value, and what to do instead. The command line
    prints it and exits with code 2; the library raises it before anything is written or changed.
    """


class Guardrail(SPDError, UserWarning):
    """A sign that a result should not be trusted: a warning, or under `strictly` an error."""


def caution(sentence: str, stacklevel: int = 3) -> None:
    """Warn of something that works and should not be trusted: the one door of all guardrails.

    Args:
        sentence: What is doubted, by what sign, and what to do.
        stacklevel: The line of code that a warning names, as in `warnings.warn`; by default who called the caller.

    Raises:
        Guardrail: inside `strictly(True)`, or where the caller has made an error of it with `warnings`.
    """
    warnings.warn(Guardrail(sentence), stacklevel=stacklevel)


def is_strict() -> bool:
    """Whether guardrails are errors here: by `strictly`, or by a filter of the caller's."""
    plain_filters = (one for one in warnings.filters if one[1] is None and one[3] is None)
    return next((action == "error" for action, _, kind, *_ in plain_filters if issubclass(Guardrail, kind)), False)


@contextlib.contextmanager
def strictly(strict: bool) -> Iterator[None]:
    """While open, guardrails are errors if `strict`, and otherwise what they are outside."""
    with contextlib.ExitStack() as stack:
        if strict:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("error", Guardrail)
        yield


class DamagedFile(SPDError):
    """An artefact that is there and cannot be read; where everything needed is there, it can be made again."""


UNREADABLE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError)
"""What reading damaged or hostile JSON raises: fields that are missing or something else, numbers out of range, lists
nested thousands deep."""


def one_line(error: BaseException, most: int = 200) -> str:
    """What an exception says, as one line of at most `most` characters; its type if it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def shortened(text: str, most: int = 60) -> str:
    """The text, cut to `most` characters that end on three dots if it is longer."""
    return text if len(text) <= most else text[: most - 3] + "..."


class TooLong(SPDError):
    """A text does not fit: so much longer than the model's context that it was not even tokenised to its end, or cut
    where nothing of it is left to score."""


def plain(value: Any) -> Any:
    """Scalars and arrays of numpy and torch as Python's own numbers and lists; anything else as it is.

    JSON, seeds and comparisons of types take nothing else. Lists, tuples and dictionaries are gone through.
    """
    if type(value) in (list, tuple):
        return type(value)(plain(part) for part in value)
    if type(value) is dict:
        return {plain(key): plain(part) for key, part in value.items()}
    return value.tolist() if hasattr(value, "ndim") and hasattr(value, "tolist") else value


def integer_or_fraction(text: str) -> int | float:
    """A number as it is written: `1` is an integer, `1.0` a fraction. Raises `ValueError` if it is none."""
    return int(text) if text.strip().lstrip("+-").isdecimal() else float(text)


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
