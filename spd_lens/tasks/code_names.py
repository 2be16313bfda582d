"""Which names a program defines and uses, and what it needs of other pieces of code. Parsed and compiled, never run."""

from __future__ import annotations

import ast
import builtins
import re
import symtable
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from spd_lens.examples import Span

BUILTIN = frozenset(dir(builtins))
"""Names that every program has."""

UNPARSABLE = (SyntaxError, ValueError, RecursionError, MemoryError)
"""What Python raises on text that is no program."""

DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
"""Statements that define a function or a class."""

_FUTURE = re.compile(r"^from __future__ import .*$", re.MULTILINE)


def parse(code: str) -> ast.Module | None:
    """The syntax tree of a program; `None` if the text is no program."""
    try:
        return compiled(code)
    except UNPARSABLE:
        return None


def compiled(code: str) -> ast.Module:
    """The syntax tree of a program. Raises what Python's compiler raises."""
    tree = syntax_tree(code)
    with warnings.catch_warnings(action="ignore"):
        compile(code, "<code>", "exec", dont_inherit=True)  # says more: a `return` outside a function
    return tree


def syntax_tree(code: str) -> ast.Module:
    """The syntax tree of a text that can be parsed, compilable or not. Raises what Python's parser raises."""
    with warnings.catch_warnings(action="ignore"):  # "\d" in somebody's code is not the user's concern
        return ast.parse(code)


def first_line(node: ast.stmt) -> int:
    """The line in which a statement begins, decorators included."""
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])


def place_of(node: ast.expr, text: str) -> Span:
    """Characters of `text` that `node` takes. `ast` counts lines, and UTF-8 bytes within them."""
    lines = text.split("\n")
    assert node.end_lineno is not None and node.end_col_offset is not None  # always set by ast.parse

    def character(line: int, column: int) -> int:
        return len("\n".join([*lines[: line - 1], lines[line - 1].encode()[:column].decode()]))

    return character(node.lineno, node.col_offset), character(node.end_lineno, node.end_col_offset)


def source_of(node: ast.stmt, code: str) -> str:
    """The lines of a statement."""
    return "\n".join(code.split("\n")[first_line(node) - 1 : node.end_lineno])


class Names(NamedTuple):
    """The names of its module that a piece of code binds and reads."""

    defined: frozenset[str]
    """The names that it binds; `*` if it imports names that cannot be known."""
    used: frozenset[str]
    """The names that it reads, in whatever scope."""

    @classmethod
    def of(cls, code: str) -> Names:
        """The names of code that compiles."""
        top = symtable.symtable(code, "<code>", "exec")
        defined, used = set[str](), set[str]()
        for scope in _scopes(top):
            for symbol in scope.get_symbols():
                if (scope is top or symbol.is_declared_global()) and (symbol.is_assigned() or symbol.is_imported()):
                    defined.add(symbol.get_name())
                if (scope is top or symbol.is_global()) and symbol.is_referenced():
                    used.add(symbol.get_name())
        if re.search(r"^from\s.+\simport\s*\(?\s*\*", code, re.MULTILINE):
            defined.add("*")
        return cls(frozenset(defined), frozenset(used))


def _scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _scopes(child)


def with_needed(pieces: Sequence[str], place: int, functions: Collection[str]) -> str:
    """One of several pieces of code, preceded by those statements of the other pieces that define what it lacks.

    A piece lacks the names that it uses and does not define, and `functions`. The nearest definition is taken; one
    before the piece is preferred.
    """
    code = pieces[place]
    if parse(code) is None:
        return code
    defined, used = Names.of(code)
    known = BUILTIN | defined
    missing = set(used | frozenset(functions)) - known
    if not missing:
        return code
    statements = []
    for number, piece in enumerate(pieces):
        tree = parse(piece) if number != place else None
        for node in tree.body if tree else ():
            text = source_of(node, piece)
            if parse(text) is not None and not isinstance(node, ast.Expr):
                statements.append(((number, node.lineno), text, Names.of(text)))
    statements.sort(key=lambda entry: (entry[0][0] > place, abs(entry[0][0] - place), -entry[0][1]))
    taken: dict[tuple[int, int], str] = {}
    while missing:
        name = min(missing)
        known |= {name}
        for wanted in (name, "*"):
            found = next((entry for entry in statements if wanted in entry[2].defined), None)
            if found:
                taken[found[0]] = found[1]
                known |= found[2].defined
                missing |= found[2].used
                break
        missing -= known
    if not taken:
        return code
    first = _FUTURE.findall(code)  # these stand before everything else
    joined = "\n".join([*first, *(taken[key] for key in sorted(taken)), "", _FUTURE.sub("", code).strip("\n")])
    return joined if parse(joined) is not None else code
