"""Which names in a data set's tests are the program's."""

from __future__ import annotations

import ast
import builtins
import sys
import warnings
from collections.abc import Iterable, Sequence

from spd_lens.errors import SPDError


def names_of(tests: Sequence[str], setup: str, functions: Iterable[str] | None) -> tuple[list[str], list[str]]:
    """The program's names that the tests use, and the standard library's modules that they use without importing.

    A name that is both is the library's: it must not be the program that says what `sys.getsizeof` is. Nor is a
    builtin the program's, unless nothing else is called (MBPP has a task whose function is called `sum`).
    """
    if isinstance(tests, str):
        raise SPDError("tests must be a list of statements, but is one string; put it into a list")
    trees = [_parse(test, "test") for test in tests]
    for test, tree in zip(tests, trees, strict=True):
        if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
            raise SPDError(f"the test {test[:80]!r} holds no assert, so that nothing could fail")
    everything = [*trees, _parse(setup, "set-up")]
    names = [node for tree in everything for node in ast.walk(tree) if isinstance(node, ast.Name)]
    used = {name.id for name in names if isinstance(name.ctx, ast.Load)}
    unknown = used - {name for tree in everything for name in _bound(tree)}
    modules = {name for name in unknown if name in sys.stdlib_module_names}
    if functions is not None:
        asked = set(functions)
    else:
        asked = unknown - modules - set(dir(builtins)) or set.intersection(*map(_called, trees))
        if not asked or len(asked) > 1 and asked <= set(dir(builtins)):
            raise SPDError(f"it is not clear what the test {tests[0][:80]!r} calls of the program; say so in functions")
    return sorted(asked), sorted(modules - asked)


def _parse(code: str, what: str) -> ast.Module:
    try:
        with warnings.catch_warnings(action="ignore"):  # an invalid "\d" in a test is not the user's concern
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SPDError(f"the {what} {code[:80]!r} is not valid Python: {error}") from error


def _bound(tree: ast.AST) -> Iterable[str]:
    """Names that the statements define themselves, in whatever scope."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


def _called(tree: ast.AST) -> set[str]:
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {function.id for function in calls if isinstance(function, ast.Name)}
