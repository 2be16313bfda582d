"""Text from data files, made safe to show: it moves no cursor, hides nothing and does not reverse the line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Terminal control codes (all but tab and line feed), marks that reverse the reading direction, characters without a
# width (but joiners and one selector of an emoji's form, which scripts and emoji need), fillers that look like nothing,
# separators of lines, invisible tags and selectors, half characters.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ufe00-\ufe0d\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\U0001d173-\U0001d17a\U000e0000-\U000e01ef]"
    "|(?<=[\ufe00-\ufe0f])[\ufe0e\ufe0f]"
)


def visible(text: str) -> str:
    """`text` with its unsafe characters spelled out, as `\\u202e`."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def inert(text: object) -> str:
    """Text in a line of Markdown that cannot break out of a table, become HTML, a link or a picture, or hide."""
    return visible(str(text).replace("|", "\\|").replace("<", "&lt;").replace("](", "]&#40;").replace("\n", " "))


def all_visible(value: Any) -> Any:
    """Plain data, as JSON has them, with every text in them made `visible`, names of fields too."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {all_visible(key): all_visible(part) for key, part in value.items()}
    return [all_visible(part) for part in value] if isinstance(value, list | tuple) else value
