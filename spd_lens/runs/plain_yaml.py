"""YAML as settings are written: plain values in lists and tables, within limits, since a file may be a stranger's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from spd_lens.errors import SPDError, one_line
from spd_lens.files import refuse_special

_LONGEST = 2**16
"""Bytes of a file of settings; the library's own have a few thousand."""
_DEEPEST = 16
_DIGITS = 100
"""Characters of a number or a date."""


class _Loader(yaml.SafeLoader):
    """The safe loader without aliases (of which a few lines make gigabytes), without names given twice, and shallow."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="an alias (*) is not taken; write the value itself", problem_mark=mark)
        if self._depth == _DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"it is nested more than {_DEEPEST} deep", problem_mark=mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_scalar(self, node: Any) -> Any:
        if len(node.value) > _DIGITS and node.tag != "tag:yaml.org,2002:str":
            raise yaml.MarkedYAMLError(
                problem=f"a value that is no text has more than {_DIGITS} characters", problem_mark=node.start_mark
            )
        return super().construct_scalar(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep=deep)
        if len(found) < len(node.value):
            raise yaml.MarkedYAMLError(problem="a name is given twice here", problem_mark=node.start_mark)
        return found


def parse_yaml(text: str) -> Any:
    """The value that a text in YAML spells; `ValueError`, which says what is wrong in a line, for any other text."""
    if len(text) > _LONGEST:
        raise ValueError(f"it has more than {_LONGEST} characters")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(one_line(error, 300)) from error


def read_text(path: str | Path) -> str:
    """A file of settings; `SPDError` in one sentence if it cannot be read, is no UTF-8 or larger than any of them."""
    refuse_special(path)
    try:
        with Path(path).open("rb") as file:
            content = file.read(_LONGEST + 1)
        if len(content) > _LONGEST:
            raise ValueError(f"it has more than {_LONGEST} bytes")
        return content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise SPDError(f"config file {path} cannot be read: {one_line(error, 300)}") from error
