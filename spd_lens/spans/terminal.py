"""The span audit in a terminal. Scored tokens are marked by brackets and bars, so colour is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, takewhile
from statistics import median

from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from spd_lens.output import terminal, visible
from spd_lens.spans.chain import Chain
from spd_lens.spans.core import KINDS, Audit, AuditedExample, Bin, Piece

_PROMPT_CHARACTERS = 600
"""A longer prompt is shown from its end: the answer's form is asked for there."""
_ROWS = 40
_BAR = 30


def print_audit(console: Console, found: Audit, *, title: str, show: int = 3) -> None:
    """Print the first `show` examples token by token, then a row per example, flags and distributions."""
    for item in found.examples[: max(show, 0)]:
        console.print(_example(item))
    if show > 0:
        console.print(
            "Scored tokens stand between ⟦ and ⟧, with │ between one and the next; ↵ is a line break in one of them.\n",
            style="dim",
        )
    console.print(_rows(found, title))
    if found.flag_counts():
        console.print(_flags(found))
    if found.sizes:
        console.print(_bars("Scored tokens per example, |S|", found.size_bins(), found.paper_sizes))
        if bins := found.place_bins():
            console.print(_bars("Where in the completion they lie", bins, None))
    console.print(Text(headline(found), style="bold"))


_STATE = {True: ("checked", "green"), False: ("BROKEN", "bold red"), None: ("not checked", "yellow")}
"""What is said of a link of a chain: its digests agree, they do not, nothing could be compared."""


def print_chain(console: Console, chain: Chain, *, show: int = 3) -> None:
    """Print the links from the model to its calibration examples, and the first `show` examples token by token."""
    for link in chain.links:
        line = Text.assemble(_STATE[link.holds], (f" {link.what}: ", "bold"), visible(link.says))
        console.print(line, soft_wrap=True)
    for item in chain.tokens.examples[: max(show, 0)] if chain.tokens else ():
        console.print(_example(item))


def headline(found: Audit) -> str:
    """The audit in a few sentences."""
    total, sizes = len(found.examples), found.sizes
    parts = [f"{len(sizes)} of {total} examples have scored tokens."]
    if sizes:
        parts.append(f"|S|: {min(sizes)} to {max(sizes)}, median {median(sizes):g}.")
    if found.paper_sizes and found.share_in_paper_sizes is not None:
        parts.append(
            f"The paper's table 6 says {between(found.paper_sizes)} for {found.task}: "
            f"{found.share_in_paper_sizes:.0%} of these examples lie there."
        )
    if found.share_copied:
        parts.append(f"{found.share_copied:.0%} of the scored tokens can be copied from earlier in the completion.")
    n = len(found.suspicious)
    parts.append(f"{n} of {total} {'is' if n == 1 else 'are'} suspicious." if n else "Nothing is suspicious.")
    return " ".join(parts)


def between(bounds: tuple[int, int]) -> str:
    """A range as text: `5-20`, or `1`."""
    return str(bounds[0]) if bounds[0] == bounds[1] else f"{bounds[0]}-{bounds[1]}"


def bin_name(bar: Bin) -> str:
    """What stands beside a bar: `3`, `5-9` or `40-50 %`."""
    if isinstance(bar.high, float):
        return _percent(bar.low, bar.high)
    return between((int(bar.low), int(bar.high)))


def _percent(low: float, high: float) -> str:
    return f"{100 * low:.0f}-{100 * high:.0f} %"


def amount(bar: Bin) -> str:
    """What stands above a bar: a count, with one decimal where examples are spread over several bars."""
    return f"{bar.count:.1f}".removesuffix(".0")


def inside(bar: Bin, bounds: tuple[int, int] | None) -> bool:
    """Whether the whole bar lies in the paper's range."""
    return bounds is not None and bounds[0] <= bar.low and bar.high <= bounds[1]


def place_name(item: AuditedExample) -> str:
    """Where in the completion an example's scored tokens lie: `93-100 %`."""
    places = item.places
    if not places:
        return ""
    half = 0.5 / sum(piece.in_completion and piece.id is not None for piece in item.pieces)
    return _percent(places[0] - half, places[-1] + half)


def _example(item: AuditedExample) -> RenderableType:
    head = Text.assemble(("■ ", "blue"), (visible(item.example.id or "(no id)"), "bold"), f"   |S| = {item.size}")
    body = _tokens(item.pieces) if item.pieces else Text(visible(item.example.prompt), style="dim")
    notes = [_flag_line(flag.text, flag.suspicious) for flag in item.flags]
    return Group(head, body, *notes, Text())


def _flag_line(text: str, suspicious: bool) -> Text:
    return Text(f"{'⚠' if suspicious else '·'} {visible(text)}", style="yellow" if suspicious else "dim")


def _tokens(pieces: Sequence[Piece]) -> Text:
    text = Text()
    # of a long prompt, what stands before its first scored token is shown from its end
    before = list(takewhile(lambda piece: not piece.in_completion and not piece.scored, pieces))
    prompt = visible("".join(piece.text for piece in before))
    if len(prompt) > _PROMPT_CHARACTERS:
        prompt = "[...] " + prompt[-_PROMPT_CHARACTERS:]
    text.append(prompt, style="dim")
    for (scored, in_completion), run in groupby(pieces[len(before) :], key=lambda one: (one.scored, one.in_completion)):
        if not scored:
            text.append("".join(visible(piece.text) for piece in run), style=None if in_completion else "dim")
            continue
        # a token without text is the rest of the character in the token before
        marked = "│".join(visible(piece.text).replace("\n", "↵\n") or "⋯" for piece in run)
        text.append(f"⟦{marked}⟧", style="bold reverse")
    return text


def _rows(found: Audit, title: str) -> Table:
    items, caption = list(found.examples), None
    if len(items) > _ROWS:  # the suspicious ones first, since the rest is cut off
        items.sort(key=lambda item: not item.suspicious)
        caption = f"{_ROWS} of {len(items)}, the suspicious ones first; --html shows all"
    rows: list[list[RenderableType]] = []
    for item in items[:_ROWS]:
        flags = Text("\n").join(_flag_line(flag.text, True) for flag in item.flags if flag.suspicious)
        total = sum(piece.id is not None for piece in item.pieces)
        rows.append([_tail(visible(item.example.id)), str(item.size), str(total), place_name(item), flags])
    numbers = [Column(name, justify="right") for name in ("|S|", "tokens", "place")]
    head = [Column("example", no_wrap=True), *numbers, Column("flags", overflow="fold")]
    title_text = Text(visible(title), style="bold")
    return terminal(head, rows, title=title_text, title_justify="left", caption=caption)


def _tail(id: str) -> str:
    """The last 24 characters of an id, which tell it from the others."""
    return id if len(id) <= 24 else f"…{id[-23:]}"


def _flags(found: Audit) -> Table:
    head = [Column("what"), *(Column(name, justify="right") for name in ("suspicious", "as a rule harmless"))]
    rows = [[KINDS[kind], *(str(count or "-") for count in counts)] for kind, counts in found.flag_counts().items()]
    return terminal(head, rows, title="Flags, in number of examples", title_justify="left", title_style="bold")


def _bars(title: str, bins: Sequence[Bin], paper: tuple[int, int] | None) -> RenderableType:
    most, widest = max(bar.count for bar in bins), max(len(bin_name(bar)) for bar in bins)
    lines = []
    for bar in bins:
        length = round(_BAR * bar.count / most) or (1 if bar.count else 0)
        said = f" {amount(bar)}" + ("   table 6" if inside(bar, paper) else "")
        lines.append(Text.assemble(f"{bin_name(bar):>{widest}}  ", ("█" * length, "blue"), (said, "dim")))
    return Group(Text(title, style="bold"), *lines, Text())
