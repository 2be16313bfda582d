"""Numbers in the nested settings of a model's configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def numbers_in(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """All whole numbers in nested settings, each with its innermost name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from numbers_in(inner, str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from numbers_in(inner, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value
