"""Chat templates rendered as transformers renders them, on a day that is given and within bounds.

A template is a program that comes with a model. It cannot be trusted: it may loop for ever, write gigabytes, or ask for
today's date.
"""

from __future__ import annotations

import operator
import re
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, Sized, ValuesView
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, partial, wraps
from typing import Any

from jinja2 import Template, nodes
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import SecurityError
from jinja2.visitor import NodeTransformer

from spd_lens.models.transformers_private import template_environment

Message = Mapping[str, Any]

_STEPS = 100_000
"""Turns of loops and calls of macros in one rendering; the templates that we know take less than a hundred."""
_CHARACTERS = 1_000_000
"""Characters of one rendering beyond those of the messages."""
_SECONDS = 2.0
"""Seconds of computing that one rendering may take; the templates that we know take milliseconds."""
_HELD = 8
"""How many times what may be written a template may hold in one value, or write within macros and blocks."""
_BITS, _INDENT = 4096, 64
"""Of whole numbers, and the most that a text is indented or a number has behind its point."""
_FILTERS = frozenset(
    "abs capitalize count d default dictsort e escape first float format groupby indent int items join last length "
    "list lower map max min reject rejectattr replace reverse round safe select selectattr sort string title tojson "
    "trim truncate unique upper".split()
)
"""The filters that templates have: of each it is known how much it makes of what it is given."""
_METHODS = frozenset(
    "capitalize count endswith find format get index isalnum isalpha isdigit islower isspace isupper items join keys "
    "lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines "
    "startswith strip title upper values".split()
)
"""The methods of texts, lists and dictionaries that they have."""
_WIDE = re.compile(r"%[^a-zA-Z%]*(\*|\d{6})|\{[^}]*(\{|:[^}]*\d{6})")
"""A field of a format that is very wide, or as wide as another value says."""
_WATCH, _JOINED = "spd_lens_watch", "spd_lens_joined"


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
        **given, strftime_now=now.strftime, range=bounds.range, **{_WATCH: bounds.watch, _JOINED: bounds.joined}
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
        self.most, self.written, self.steps, self.shown = most, 0, 0, 0
        self.until = time.thread_time() + _SECONDS

    def watch(self, size: int = 0, *kept: Any) -> str:
        """Count one step that writes so many characters; called at every turn of a loop, and with everything that is
        put into a variable."""
        self._count(1)
        self._show(size)
        self.hold(kept)
        return ""

    def range(self, *ends: int) -> Sequence[int]:
        """Count the whole range at once, since a filter goes through it without a loop."""
        self._count(len(found := range(*ends)))
        return found

    def joined(self, *parts: Any) -> str:
        """What `~` makes."""
        self.hold(parts)
        return "".join(map(str, parts))

    def finalized(self, value: Any) -> Any:
        """Called with everything that is written, in macros and blocks, too."""
        self._show(self.hold(value))
        return value

    def hold(self, value: Any, times: int = 1) -> int:
        """How much there is in a value, counted as often as it would be written; refuse too much of it.

        Args:
            value: Texts, numbers, and lists and dictionaries of them.
            times: How often it is to be repeated.
        """
        size, inner = 0, [value]
        while inner:
            one = inner.pop()
            if isinstance(one, int):
                if one.bit_length() > _BITS:
                    raise OverflowError(f"it computes with whole numbers of more than {_BITS} bits")
                size += 1 + one.bit_length() // 3
                continue
            if isinstance(one, Context | Undefined):
                size += 1
                continue
            size += len(one) if isinstance(one, Sized) else 1
            if size * times > _HELD * self.most:
                raise OverflowError(f"it makes more than {_HELD * self.most:,} characters")
            if isinstance(one, Mapping):
                inner += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple | set | KeysView | ValuesView | ItemsView):
                inner += one
        return size

    def look_at_the_clock(self) -> None:
        """Called before every filter and function, too, of which a template may have a hundred thousand in a row."""
        if time.thread_time() > self.until:
            raise OverflowError(f"it takes more than {_SECONDS:g} seconds")

    def _count(self, steps: int) -> None:
        self.look_at_the_clock()
        self.steps += steps
        if self.steps > _STEPS:
            raise OverflowError(f"its loops take more than {_STEPS:,} steps")

    def _show(self, size: int) -> None:
        self.shown += size
        if self.shown > _HELD * self.most:
            raise OverflowError(f"it makes more than {_HELD * self.most:,} characters")

    def add(self, chunk: str) -> None:
        self.written += len(chunk)
        if self.written > self.most:
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
        written = sum(len(data.data) for part in node.body for data in part.find_all(nodes.TemplateData))
        node.body.insert(0, _watched(nodes.Const(written)))
    for body in list(_bodies(tree)):
        for place, node in reversed(list(enumerate(body))):
            if isinstance(node, nodes.Assign | nodes.AssignBlock):
                body[place + 1 : place + 1] = [_watched(nodes.Const(0), *_targets(node.target))]
    tree = _Concatenations().visit(tree)
    tree.set_lineno(1)  # of the new nodes alone
    tree.set_environment(environment)
    return environment.from_string(tree)


class _Concatenations(NodeTransformer):
    """Lets `~` be computed within bounds."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:  # jinja2's name
        parts = [self.visit(part) for part in node.nodes]
        return nodes.Call(nodes.Name(_JOINED, "load"), parts, [], None, None, lineno=node.lineno)


def _environment() -> Any:
    """transformers' environment, in which operators, filters and functions are computed within bounds."""
    environment = template_environment()
    environment.intercepted_binops = frozenset({"*", "**", "%", "+"})
    environment.call_binop = _arithmetic
    environment.filters = {name: _bounded(name, environment.filters[name]) for name in sorted(_FILTERS)}
    environment.globals = {name: value for name, value in environment.globals.items() if name != "lipsum"}
    environment.finalize = _finalized
    call = environment.call

    def bounded_call(context: Any, function: Any, *values: Any, **named: Any) -> Any:
        name, receiver = getattr(function, "__name__", ""), getattr(function, "__self__", None)
        if (isinstance(receiver, _PLAIN) or any(receiver is one for one in _PLAIN)) and name not in _METHODS:
            raise SecurityError(f"there is no method {name!r} in chat templates")
        return _within(name, partial(call, context, function), (receiver,), values, named)

    environment.call = bounded_call
    return environment


_PLAIN = (str, bytes, int, float, list, tuple, set, dict)


def _finalized(value: Any) -> Any:
    bounds = _BOUNDS.get()
    return value if bounds is None else bounds.finalized(value)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at what it is given first."""

    @wraps(function)  # and its marks, by which jinja knows what to hand to it
    def filtered(*values: Any, **named: Any) -> Any:
        return _within(name, function, (), values, named)

    return filtered


def _within(
    name: str, function: Callable[..., Any], of: tuple[Any, ...], values: Sequence[Any], named: Mapping[str, Any]
) -> Any:
    """What a filter or a function makes of its values, `of` the object that a method belongs to.

    Refuses what would make gigabytes out of short values before it is computed, and what is too much afterwards.
    """
    bounds = _BOUNDS.get()
    if bounds is None:
        return function(*values, **named)
    bounds.look_at_the_clock()
    values = [_held(value, bounds) for value in values]
    given, options = [*of, *values, *named.values()], [*values[1:], *named.values()]
    size, texts = bounds.hold(given), [value for value in given if isinstance(value, str)]
    widths = [abs(one) if isinstance(one, int) else len(one) for one in options if isinstance(one, int | str)]
    if name in ("format", "strftime"):
        if any(_WIDE.search(text) for text in texts):
            raise OverflowError("a field of a format is too wide")
    elif name == "replace" and len(texts) > 2:
        bounds.hold(texts[2], texts[0].count(texts[1]))
    elif name == "join":
        bounds.hold(max(texts, key=len, default=""), size)
    elif name in ("indent", "tojson", "round") and max(widths, default=0) > _INDENT:
        raise OverflowError(f"{name} by more than {_INDENT}")
    found = function(*values, **named)
    if not isinstance(found, Iterator):
        bounds.hold(found)
    return found


def _held(value: Any, bounds: _Bounds) -> Any:
    """What an iterator gives, as a list that is not too much; anything else as it is."""
    if not isinstance(value, Iterator) or isinstance(value, LoopContext):
        return value
    found: list[Any] = []
    size = 0
    for one in value:
        found.append(one)
        size += bounds.hold(one)
        bounds.hold("x", size)
    return found


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


def _arithmetic(_context: Any, sign: str, left: Any, right: Any) -> Any:
    """Compute sums, products, powers and what `%` writes; refuse what makes gigabytes out of two short operands."""
    if (bounds := _BOUNDS.get()) is not None:
        bounds.hold((left, right))
        if sign == "%" and isinstance(left, str) and _WIDE.search(left):
            raise OverflowError("a field of a format is too wide")
        for one, other in ((left, right), (right, left)):
            if sign == "*" and isinstance(one, int) and isinstance(other, str | bytes | list | tuple):
                bounds.hold(other, max(one, 0))
        if sign == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _BITS:
            raise OverflowError(f"it computes with whole numbers of more than {_BITS} bits")
    return _OPERATORS[sign](left, right)


_OPERATORS = {"+": operator.add, "*": operator.mul, "**": operator.pow, "%": operator.mod}
