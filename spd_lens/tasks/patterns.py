"""Regular expressions that come with data: compiled and searched with limits, since data are not trusted."""

from __future__ import annotations

import re
from functools import lru_cache

import regex  # like `re`, with a time limit

from spd_lens.errors import SPDError
from spd_lens.examples import Span

_SECONDS = 2.0
"""Time that one search for a pattern may take."""
_MOST_CHARACTERS = 2000
"""Characters of a pattern."""
_MOST_COUNTED = 200_000
"""Steps that a pattern may have once its counts (`{2,5}`) are written out, which is what its compilation takes."""


@lru_cache(maxsize=256)
def compiled(pattern: str, where: str) -> tuple[regex.Pattern[str], str]:
    """A pattern and the name of the group that is the span: `answer`, or the only named group."""
    if len(pattern) > _MOST_CHARACTERS:
        raise SPDError(
            f"{where}: the regular expression {pattern[:80]!r} has {len(pattern)} characters, and at most "
            f"{_MOST_CHARACTERS} are allowed"
        )
    if written_out(pattern) > _MOST_COUNTED:
        raise SPDError(
            f"{where}: the counts in the regular expression {pattern[:80]!r} multiply to too much; lower them"
        )
    try:
        ready = regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise SPDError(f"{where}: the regular expression {pattern[:80]!r} does not compile ({error})") from error
    names = list(ready.groupindex)
    group = "answer" if "answer" in names else names[0] if len(names) == 1 else None
    if group is None:
        raise SPDError(
            f"{where}: the regular expression {pattern[:80]!r} needs a named group for the span, "
            f"(?P<answer>...), and has {len(names)} named groups"
        )
    return ready, group


def written_out(pattern: str) -> int:
    """How many steps a regular expression has with every `x{2,5}` written out as `xxxxx`."""
    totals, last = [0], 0
    for match in re.finditer(r"\\.|\[\]?(?:\\.|[^\]\\])*\]|\{(\d{1,9})(?:,(\d{0,9}))?\}|.", pattern, re.DOTALL):
        if match[1]:
            totals[-1] += last * (max(int(match[1]), int(match[2] or 0)) - 1)
            continue
        if match[0] == "(":
            totals.append(0)
        elif match[0] == ")" and len(totals) > 1:
            last = totals.pop()
            totals[-1] += last
        else:
            last = 1
            totals[-1] += 1
    return sum(totals)


def last_match(pattern: str, text: str, where: str) -> Span | None:
    """Where the pattern's group last matches in `text` with at least one character."""
    ready, group = compiled(pattern, where)
    try:
        found = [match.span(group) for match in ready.finditer(text, timeout=_SECONDS)]
    except TimeoutError as error:
        raise SPDError(f"{where}: the regular expression {pattern[:80]!r} takes too long; make it simpler") from error
    return next((span for span in reversed(found) if 0 <= span[0] < span[1]), None)
