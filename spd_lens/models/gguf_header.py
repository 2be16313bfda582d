"""The header of a GGUF file, looked at before transformers reads it: its counts are what the file can hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gguf import GGUFReader

_MOST_READS = 4_000_000
"""Values in a header; those of a vocabulary of 256,000 with its merges are 2,500,000."""
_COUNTS = re.compile(r"\.(block|expert|layer)_count$")
_FEW = 1024


class _Bounded(GGUFReader):
    """The reader of the package, which otherwise reads on behind the end of a file for as long as a count says."""

    _reads = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        found = super()._get(offset, dtype, count, override_order)
        self._reads += 1
        if len(found) < int(count):
            raise ValueError("it ends within its header")
        if self._reads > _MOST_READS:
            raise ValueError(f"its header has more than {_MOST_READS} values")
        return found


def check_header(gguf: Path) -> None:
    """Look through a header, with its tensors' names, types and places.

    Raises:
        ValueError: it says more than the file can hold, or more layers or experts than it has tensors. Other types
            are raised for what is no such header.
    """
    header = _Bounded(gguf)
    most = max(len(header.tensors), _FEW)
    for name, field in header.fields.items():
        if _COUNTS.search(name) and not 0 <= (count := int(field.contents())) <= most:
            raise ValueError(f"{name} is {count}, and it has {len(header.tensors)} tensors")
