"""Programs with one place changed: which places of a solution its tests depend on. Parsed here, run by the caller."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from spd_lens.examples import Span
from spd_lens.tasks.code_names import compiled, parse, place_of

_SWAPS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"), ast.Pow: ("**", "*"), ast.LShift: ("<<", ">>"), ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.BitXor: ("^", "&"),
    ast.And: ("and", "or"), ast.Or: ("or", "and"), ast.Not: ("not", ""), ast.USub: ("-", ""),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Lt: ("<", ">="), ast.GtE: (">=", "<"),
    ast.Gt: (">", "<="), ast.LtE: ("<=", ">"), ast.Is: ("is", "is not"), ast.In: ("in", "not in"),
}  # fmt: skip
"""Operators as they are written, and what is put in their place."""
_OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any"}


def exercised(code: str, passes: Callable[[str], bool]) -> tuple[Span, ...]:
    """The characters of a program at which a change makes it fail, in order; none where it fails as it is.

    Args:
        code: A solution.
        passes: Whether a program passes the solution's tests.
    """
    if not passes(code):
        return ()
    return tuple(span for span, mutant in sorted(mutants(code).items()) if not passes(mutant))


def mutants(code: str) -> dict[Span, str]:
    """The program with one change, by the characters that were changed: another constant, the opposite of an operator,
    or another local name in place of one that is read. Only what compiles is there."""
    changed = {span: f"{code[: span[0]]}{text}{code[span[1] :]}" for span, text in _changes(code)}
    return {span: mutant for span, mutant in changed.items() if parse(mutant) is not None}


def _changes(code: str) -> Iterator[tuple[Span, str]]:
    for top in compiled(code).body:
        nodes = list(_walk(top))
        names = list(dict.fromkeys(name for node in nodes if (name := _bound(node))))
        for node in nodes:
            match node:
                case ast.Constant(value) if (text := _another(value)) is not None:
                    yield place_of(node, code), text
                case ast.Name(id, ast.Load()) if id in names and len(names) > 1:
                    yield place_of(node, code), names[(names.index(id) + 1) % len(names)]
                case ast.Name(id, ast.Load()) if id in _OPPOSITES and id not in names:
                    yield place_of(node, code), _OPPOSITES[id]
                case ast.BinOp(left, operator, right):
                    yield from _swapped(operator, left, right, code)
                case ast.AugAssign(target, operator, value):
                    yield from _swapped(operator, target, value, code)
                case ast.BoolOp(operator, values):
                    for left, right in zip(values, values[1:], strict=False):
                        yield from _swapped(operator, left, right, code)
                case ast.Compare(left, comparisons, values):
                    for comparison, first, second in zip(comparisons, [left, *values], values, strict=False):
                        yield from _swapped(comparison, first, second, code)
                case ast.UnaryOp(operator, operand):
                    start, _ = place_of(node, code)
                    yield from _between(operator, start, place_of(operand, code)[0], code)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a statement, without documentation and without what stands in f-strings, whose places are not known
    in every Python."""
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _walk(child)


def _bound(node: ast.AST) -> str:
    """The name that a node gives a value, if any."""
    match node:
        case ast.arg(name) | ast.Name(name, ast.Store()):
            return name
    return ""


def _another(value: object) -> str | None:
    """Another constant of the same kind; None for a kind that is left as it is."""
    match value:
        case bool():
            return repr(not value)
        case int() | float():
            return repr(value + 1)
        case str():
            return repr(value + "x")
    return None


def _swapped(operator: ast.AST, left: ast.expr, right: ast.expr, code: str) -> Iterator[tuple[Span, str]]:
    yield from _between(operator, place_of(left, code)[1], place_of(right, code)[0], code)


def _between(operator: ast.AST, start: int, end: int, code: str) -> Iterator[tuple[Span, str]]:
    """The operator's place between the characters `start` and `end`, and what is put there."""
    written, instead = _SWAPS.get(type(operator), ("", ""))
    at = code.find(written, start, end) if written else -1
    if at >= 0:
        yield (at, at + len(written)), instead
