"""Text from data files, made safe to show: it moves no cursor, hides nothing and does not reverse the line."""

from __future__ import annotations

import re

# Terminal control codes (all but tab and line feed), marks that reverse the reading direction, half characters.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    """`text` with its unsafe characters spelled out, as `\\u202e`."""
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
