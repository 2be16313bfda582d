"""Python functions with asserts: where the expected values stand, and how a completion becomes a program to run.

Nothing here runs code: it is only parsed, with `ast`. Running it is the caller's affair (`CodeTask.executor`).
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from spd_lens.errors import SPDError
from spd_lens.examples import Example, Span
from spd_lens.tasks.base import TwoScorings, normalised
from spd_lens.tasks.code_blocks import extract_code
from spd_lens.tasks.code_names import DEFINITION, UNPARSABLE, compiled, parse, syntax_tree
from spd_lens.tasks.scoring import reference

Executor = Callable[[str, Sequence[str], str], bool]
"""`(code, tests, setup) -> passed`: `code` is a model's and not trusted; `tests` are asserts, `setup` statements before
them that may use the code's classes. Both come from the data set. One that also takes `timeout_s` is told the limit of
`scoring="reference"`."""


@dataclass(kw_only=True)
class CodeTask(TwoScorings):
    """Completion: the reference solution, then asserts (paper table 6: the span is assertion-relevant, 5-20 tokens).

    Whether a completion is right is found out by running it against the asserts.
    """

    span: Literal["values", "asserts", "solution"] = "values"
    """What decides correctness: the expected values in the asserts, the asserts, or the solution before them."""
    asserts_in_prompt: bool = False
    """Shows the asserts in the prompt too, as MBPP's own evaluation does. The expected values can then be copied, so
    that their gradients say more about copying than about code."""
    executor: Executor | None = field(default=None, repr=False, compare=False)
    """Says whether code passes its tests: `executor(code, tests, setup)`. The three stay apart so that it can keep
    untrusted code away from the tests. `None`: completions cannot be scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_option("span", ("values", "asserts", "solution"))
        self.check_option("asserts_in_prompt", (True, False))
        if self.executor is not None and not callable(self.executor):
            raise SPDError(
                f"{self.name}'s executor must be a function of code, tests and set-up, not {self.executor!r}"
            )

    def example(
        self, id: str, problem: str, solution: str, tests: Sequence[str], *, setup: str = "", where: str = ""
    ) -> Example:
        """Puts a problem, its reference solution and its asserts into the form that all these tasks share."""
        solution, tests = solution.replace("\r\n", "\n").strip("\n").rstrip(), [_tidy(test) for test in tests]
        if not tests:
            raise SPDError(f"{where}: there are no asserts, so that nothing says which code is right")
        try:
            header, functions = signature(solution, tests)
            relative = [expected_values(test, functions) for test in tests]
        except UNPARSABLE as error:
            raise SPDError(f"{where}: the code or an assert is not valid Python ({error})") from error
        completion = solution + "\n"
        spans: list[Span] = []
        for test, found in zip(tests, relative, strict=True):
            start = len(completion) + 1
            completion += f"\n{test}"
            here = found if self.span == "values" else [(0, len(test))]
            spans += [(start + begin, start + end) for begin, end in here]
        if self.span == "solution":
            spans = [(0, len(solution))]
        shown = "\n\nThe code must pass these tests:\n" + "\n".join(tests) if self.asserts_in_prompt else ""
        prompt = (
            f"{problem.strip()}{shown}\n\n"
            f"Write the function `{header}` in Python, followed by {len(tests)} assert statements that test it."
        )
        meta = {"problem": problem.strip(), "tests": tests, "setup": _tidy(setup)}
        return Example(prompt, completion, tuple(spans), id, meta)

    def problem(self, example: Example) -> str:
        return normalised(example.meta["problem"])

    def extract(self, text: str) -> str | None:
        return reference.program(text) if self.scoring == "reference" else extract_code(text)

    def in_asked_form(self, text: str) -> bool:
        """Whether there is Python that parses and defines something."""
        try:
            tree = syntax_tree(self.extract(text) or "")
        except UNPARSABLE:
            return False
        return any(isinstance(node, DEFINITION) for node in tree.body)

    def score(self, item: Example, text: str) -> float:
        """1.0 if the completion's code passes the item's asserts (pass@1 of one sample), else 0.0."""
        self.check_scorable()
        assert self.executor is not None
        tests, setup = item.meta["tests"], item.meta["setup"]
        if self.scoring == "reference":
            code = reference.program(text)
            return float(code is not None and _hasty(self.executor)(code, tests, setup))
        header, functions = signature(item.meta.get("solution", item.completion), tests)
        code = extract_code(text, functions, header)
        return float(code is not None and self.executor(without_asserts(code), tests, setup))

    def check_scorable(self) -> None:
        if self.executor is None:
            raise SPDError(
                f"scoring {self.name} means running code that a model wrote; say --allow-code-execution "
                "(in Python: set the task's executor), or leave the task out"
            )


def _hasty(executor: Executor) -> Executor:
    """The executor with the reference code's time limit, if it takes one (as `timeout_s`); else as it is."""
    try:
        limited = "timeout_s" in inspect.signature(executor).parameters
    except (TypeError, ValueError):  # a callable without a signature, such as some builtins
        limited = False
    return functools.partial(executor, timeout_s=reference.CODE_SECONDS) if limited else executor


def signature(solution: str, tests: Sequence[str]) -> tuple[str, set[str]]:
    """The header of the function that the tests call (`def f(a, b)`), and the names of all of the solution's functions
    that they call."""
    called = [name for test in tests for name in _called(compiled(test))]
    defined = {node.name: node for node in compiled(solution).body if isinstance(node, ast.FunctionDef)}
    tested = [name for name in called if name in defined]
    if tested:
        node = defined[tested[0]]
        return f"def {node.name}({ast.unparse(node.args)})", set(tested)
    name = next((name for name in called if not hasattr(builtins, name)), "solution")
    return f"def {name}(...)", {name}


def expected_values(test: str, functions: set[str]) -> list[Span]:
    """Where in an assert the expected value stands: the characters that a wrong answer would change.

    `assert f(1) == 2` and `assert 2 == f(1)`: the `2`. `assert isclose(f(1), 2.5, rel_tol=0.1)`: the `2.5`.
    `assert not f(1)` and `assert f(1)`: `not` and `f`, since what comes first after `assert` says which it is.
    """
    spans = [
        span
        for node in compiled(test).body
        if isinstance(node, ast.Assert)
        for span in _expected(node.test, test, functions)
    ]
    if not spans:
        raise ValueError(f"no assert in {test[:60]!r}")
    return spans


def _expected(node: ast.expr, text: str, functions: set[str]) -> Iterator[Span]:
    def calls(part: ast.AST) -> bool:
        return any(name in functions for name in _called(part))

    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        values = [side for side in sides if not calls(side)] if any(map(calls, sides)) else []
        yield _place(values[-1] if values else sides[-1], text)
    elif isinstance(node, ast.BoolOp):
        for part in node.values:
            yield from _expected(part, text, functions)
    elif isinstance(node, ast.Call) and any(map(calls, node.args)):
        values = [argument for argument in node.args if not calls(argument)]
        yield _place(values[0] if values else node.func, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        start, _ = _place(node, text)
        yield start, start + len("not")
    else:
        yield _place(node.func if isinstance(node, ast.Call) else node, text)


def _called(tree: ast.AST) -> list[str]:
    """Names of the functions called anywhere in `tree`, outermost first."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node.func.id for node in calls if isinstance(node.func, ast.Name)]


def _place(node: ast.expr, text: str) -> Span:
    """Characters of `text` that `node` takes. `ast` counts lines, and UTF-8 bytes within them."""
    lines = text.split("\n")
    assert node.end_lineno is not None and node.end_col_offset is not None  # always set by ast.parse

    def character(line: int, column: int) -> int:
        return len("\n".join([*lines[: line - 1], lines[line - 1].encode()[:column].decode()]))

    return character(node.lineno, node.col_offset), character(node.end_lineno, node.end_col_offset)


def without_asserts(code: str) -> str:
    """`code` without its top-level asserts: a model's own wrong test is no reason to fail its function."""
    tree = parse(code)
    if tree is None or not any(isinstance(node, ast.Assert) for node in tree.body):
        return code
    tree.body = [node for node in tree.body if not isinstance(node, ast.Assert)]
    try:
        return ast.unparse(tree)
    except RecursionError:
        return code


def _tidy(code: str) -> str:
    return code.replace("\r\n", "\n").strip()
