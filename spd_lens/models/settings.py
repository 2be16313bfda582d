"""Numbers in the nested settings of a model's configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

_N = TypeVar("_N", int, float)


def numbers_in(value: Any, name: str = "", kind: type[_N] = int) -> Iterator[tuple[str, _N]]:
    """All numbers of a kind (whole ones) in nested settings, each with its innermost name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from numbers_in(inner, str(key), kind)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from numbers_in(inner, name, kind)
    elif isinstance(value, kind) and not isinstance(value, bool):
        yield name, value
