"""Chat templates rendered as transformers renders them, on a day that is given and within bounds.

A template is a program that comes with a model. It cannot be trusted: it may loop for ever, write gigabytes, or ask for
today's date.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, nodes

from spd_lens.models.transformers_private import template_environment

Message = Mapping[str, Any]

_STEPS = 100_000
"""Turns of loops and calls of macros in one rendering; the templates that we know take less than a hundred."""
_CHARACTERS = 1_000_000
"""Characters of one rendering beyond those of the messages."""
_SECONDS = 2.0
"""Seconds of computing that one rendering may take; the templates that we know take milliseconds."""
_GROWN = 64 * _CHARACTERS
_GROWING = frozenset(
    "batch center expandtabs indent join ljust replace rjust slice tojson urlize wordwrap xmlattr zfill".split()
)
"""Filters and methods whose result may be as long as the product of what they are given."""
_WIDE = re.compile(r"%[^a-zA-Z%]*(\*|\d{6})|\{[^}]*(\{|:[^}]*\d{6})")
"""A field of a format that is very wide, or as wide as another value says."""
_WATCH = "spd_lens_watch"


def render(
    tokenizer: Any, messages: Sequence[Message], *, generation: bool = True, date: str | None = None, **options: Any
) -> str:
    """The conversation as text; an error that the template raises is passed on.

    Args:
        tokenizer: The tokenizer, with the template and the special tokens that the template may name.
        messages: Messages with a role and a content, which is a text or a list of parts.
        generation: Whether the text ends with what opens the model's own turn.
        date: The day, as YYYY-MM-DD, that the template takes for today. None: today.
        options: Other variables that the template may read.

    Raises:
        OverflowError: it takes too many steps, or writes too much.
    """
    bounds = _Bounds(_CHARACTERS + sum(len(str(message["content"])) for message in messages))
    now = datetime.fromisoformat(date) if date else datetime.now()
    given = {**tokenizer.special_tokens_map, **options, "messages": list(messages), "add_generation_prompt": generation}
    chunks = []
    _BOUNDS.set(bounds)
    for chunk in _compiled(tokenizer.get_chat_template(None)).generate(
        **given, strftime_now=now.strftime, range=bounds.range, **{_WATCH: bounds.watch}
    ):
        bounds.add(chunk)
        chunks.append(chunk)
    return "".join(chunks)


def asks_for_the_date(tokenizer: Any) -> bool:
    """Whether the template may show the day on which it is rendered."""
    tree = _environment().parse(tokenizer.get_chat_template(None))
    return any(name.name == "strftime_now" for name in tree.find_all(nodes.Name))


def ending(tokenizer: Any, text: str, opened: str, question: str, answer: str) -> int | None:
    """The token that stands right behind the answer and nowhere else but behind messages; None if there is none.

    Args:
        tokenizer: The tokenizer.
        text: A conversation of a question and its answer.
        opened: The question alone, with what opens the answer.
        question: The question: a word that is not in the template.
        answer: The answer: another such word.
    """
    before, answered, rest = text.rpartition(answer)
    before, asked, between = before.rpartition(question)
    tokens = {str(token): id for id, token in tokenizer.added_tokens_decoder.items()}
    behind = [token for token in tokens if token.strip() and rest.lstrip().startswith(token)]
    if not (answered and asked and behind):
        return None
    token = max(behind, key=len)
    opens = text.lstrip().startswith(token) or before.rstrip().endswith(token)
    within = [part.lstrip().removeprefix(token) for part in (between, opened.rpartition(question)[2])]
    if opens or any(token in part for part in within) or token == tokenizer.bos_token != tokenizer.eos_token:
        return None
    return tokens[token]


class _Bounds:
    """Counts what one rendering does."""

    def __init__(self, most: int) -> None:
        self.most, self.written, self.steps = most, 0, 0
        self.until = time.thread_time() + _SECONDS

    def watch(self, value: Any = None) -> str:
        """Count one step; called at every turn of a loop, and with everything that is put into a variable."""
        self._count(1)
        self._refuse(len(value) if isinstance(value, str | list | tuple) else 0)
        return ""

    def range(self, *ends: int) -> Sequence[int]:
        """Count the whole range at once, since a filter goes through it without a loop."""
        self._count(len(found := range(*ends)))
        return found

    def look_at_the_clock(self) -> None:
        """Called before every filter and function, too, of which a template may have a hundred thousand in a row."""
        if time.thread_time() > self.until:
            raise OverflowError(f"it takes more than {_SECONDS:g} seconds")

    def _count(self, steps: int) -> None:
        self.look_at_the_clock()
        self.steps += steps
        if self.steps > _STEPS:
            raise OverflowError(f"its loops take more than {_STEPS:,} steps")

    def add(self, chunk: str) -> None:
        self.written += len(chunk)
        self._refuse(self.written)

    def _refuse(self, size: int) -> None:
        if size > self.most:
            raise OverflowError(f"it writes more than {self.most:,} characters")


_BOUNDS: ContextVar[_Bounds | None] = ContextVar("spd_lens_bounds", default=None)
"""Of the rendering that goes on."""


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    """The template with a call of the watch wherever it can repeat itself or keep something."""
    if len(source) > _CHARACTERS:
        raise OverflowError(f"it has more than {_CHARACTERS:,} characters itself")
    environment = _environment()
    tree = environment.parse(source)
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        node.body.insert(0, _watched())
    for body in list(_bodies(tree)):
        for place, node in reversed(list(enumerate(body))):
            if isinstance(node, nodes.Assign | nodes.AssignBlock):
                body[place + 1 : place + 1] = [_watched(kept) for kept in _targets(node.target)]
    tree.set_lineno(1)  # of the new nodes alone
    tree.set_environment(environment)
    return environment.from_string(tree)


def _environment() -> Any:
    """transformers' environment, in which operators, filters and functions are computed within bounds."""
    environment = template_environment()
    environment.intercepted_binops = frozenset({"*", "**", "%"})
    environment.call_binop = _arithmetic
    environment.filters = {name: _bounded(name, function) for name, function in environment.filters.items()}
    environment.globals = {name: value for name, value in environment.globals.items() if name != "lipsum"}
    call = environment.call

    def bounded_call(context: Any, function: Any, *values: Any, **named: Any) -> Any:
        name, receiver = getattr(function, "__name__", ""), getattr(function, "__self__", None)
        _check_growth(name, (receiver, *values, *named.values()))
        return call(context, function, *values, **named)

    environment.call = bounded_call
    return environment


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at what it is given first."""

    @wraps(function)  # and its marks, by which jinja knows what to hand to it
    def filtered(*values: Any, **named: Any) -> Any:
        _check_growth(name, (*values, *named.values()))
        return function(*values, **named)

    return filtered


def _check_growth(name: str, given: Sequence[Any]) -> None:
    """Refuse what would make gigabytes out of short values, before it is computed."""
    if bounds := _BOUNDS.get():
        bounds.look_at_the_clock()
    values = [value for value in given if isinstance(value, int | Sized | Iterator)]
    if name.startswith("format"):
        grows = any(isinstance(value, str) and _WIDE.search(value) for value in values[:1])
    elif name == "replace" and len(values) > 2 and all(isinstance(value, str) for value in values[:3]):
        text, old, new = map(str, values[:3])
        grows = text.count(old) * len(new) > _GROWN
    else:
        grows = name in _GROWING and math.prod(max(_size(value), 1) for value in values) > _GROWN
    if grows:
        raise OverflowError(f"{name} makes more than {_GROWN:,} characters")


def _size(value: int | Sized | Iterator[Any]) -> int:
    if isinstance(value, int):
        return abs(value)
    return len(value) if isinstance(value, Sized) else _STEPS  # of an iterator, the most that it can have


def _bodies(node: nodes.Node) -> Iterator[list[nodes.Node]]:
    """All lists of statements of a template."""
    for _, value in node.iter_fields():
        if isinstance(value, list) and any(isinstance(entry, nodes.Stmt) for entry in value):
            yield value
    for child in node.iter_child_nodes():
        yield from _bodies(child)


def _targets(target: nodes.Node) -> list[nodes.Expr]:
    """The variables that a `set` has written, as expressions that read them."""
    if isinstance(target, nodes.Name):
        return [nodes.Name(target.name, "load")]
    if isinstance(target, nodes.NSRef):
        return [nodes.Getattr(nodes.Name(target.name, "load"), target.attr, "load")]
    return [found for part in target.iter_child_nodes() for found in _targets(part)]


def _watched(*values: nodes.Expr) -> nodes.Stmt:
    return nodes.ExprStmt(nodes.Call(nodes.Name(_WATCH, "load"), list(values), [], None, None))


def _arithmetic(_context: Any, operator: str, left: Any, right: Any) -> Any:
    """Compute products, powers and what `%` writes; refuse those that make gigabytes out of two short operands."""
    if operator == "%":
        _check_growth("format", (left,))
        return left % right
    for one, other in ((left, right), (right, left)):
        if isinstance(one, int) and one > 1:
            size = len(other) if isinstance(other, str | list | tuple) else 0
            if size * one > _CHARACTERS or (operator == "**" and one > _CHARACTERS.bit_length()):
                raise OverflowError(f"{operator} makes more than {_CHARACTERS:,} characters")
    return left * right if operator == "*" else left**right
