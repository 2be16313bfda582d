"""Drafts that a model thinks before its answer."""

from __future__ import annotations

import re

_NAMES = r"think(?:ing)?|thoughts?|reason(?:ing)?|reflection|analysis|scratch_?pad|draft"
_THOUGHT = re.compile(
    rf"""(?P<open><\|?(?:seed:)?(?:{_NAMES})\b[^<>\n]{{0,80}}> | \[THINK\] | ◁think▷
        | <\|(?:begin|start)_of_(?:thought|thinking)\|> | <\|START_THINKING\|>
        | <\|channel\|>\s?(?:analysis|commentary))
      | (?P<close><\|?/(?:seed:)?(?:{_NAMES})\|?> | \[/THINK\] | ◁/think▷
        | assistantfinal | <\|end_of_(?:thought|thinking)\|> | <\|END_THINKING\|>
        | <\|channel\|>\s?final(?:<\|message\|>)?)""",
    re.IGNORECASE | re.VERBOSE,
)


def without_thoughts(text: str) -> str:
    """`text` without `<think>...</think>` and its like. An open block runs to the end; where a block is only closed,
    its beginning stood in the prompt."""
    kept: list[str] = []
    position, inside = 0, False
    for tag in _THOUGHT.finditer(text):
        if tag["close"]:
            if not inside:
                kept.clear()
            position, inside = tag.end(), False
        elif not inside:
            kept.append(text[position : tag.start()])
            inside = True
    return "".join(kept) if inside else "".join([*kept, text[position:]])
