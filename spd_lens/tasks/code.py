"""Python functions with asserts: where the expected values stand, and how a completion becomes a program to run.

Nothing here runs code: it is only parsed, with `ast`. Running it is the caller's affair (`CodeTask.executor`), for
scores and for finding out what the asserts depend on (`with_results`).
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from spd_lens.errors import SPDError
from spd_lens.examples import Example, Span
from spd_lens.tasks.base import Split, TwoScorings, normalised
from spd_lens.tasks.code_blocks import extract_code
from spd_lens.tasks.code_names import DEFINITION, UNPARSABLE, compiled, parse, place_of, syntax_tree
from spd_lens.tasks.marks import copies
from spd_lens.tasks.mutants import exercised
from spd_lens.tasks.scoring import reference

log = logging.getLogger(__name__)

Executor = Callable[[str, Sequence[str], str], bool | None]
"""`(code, tests, setup) -> passed`: `code` is a model's and not trusted; `tests` are asserts, `setup` statements before
them that may use the code's classes. Both come from the data set. None: a wrong answer passes the tests, so that they
cannot judge the code. One that also takes `timeout_s` is told the limit of `scoring="reference"`."""


@dataclass(kw_only=True)
class CodeTask(TwoScorings):
    """Completion: the reference solution, then asserts (paper table 6: the span is assertion-relevant, 5-20 tokens).

    Whether a completion is right is found out by running it against the asserts.
    """

    span: Literal["values", "asserts", "solution", "results"] = "values"
    """What decides correctness: the expected values in the asserts, the asserts, or the solution before them;
    `results`: those places of the solution at which a change makes an assert fail (see `with_results`)."""
    asserts_in_prompt: bool = False
    """Shows the asserts in the prompt too, as MBPP's own evaluation does. The expected values can then be copied, so
    that their gradients say more about copying than about code."""
    executor: Executor | None = field(default=None, repr=False, compare=False)
    """Says whether code passes its tests: `executor(code, tests, setup)`. The three stay apart so that it can keep
    untrusted code away from the tests. `None`: completions cannot be scored."""
    _exercised: dict[str, tuple[Span, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _unjudged: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_option("span", ("values", "asserts", "solution", "results"))
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
        values, asserts = list[Span](), list[Span]()
        for test, found in zip(tests, relative, strict=True):
            start = len(completion) + 1
            completion += f"\n{test}"
            asserts.append((start, len(completion)))
            values += [(start + begin, start + end) for begin, end in found]
        spans = {"values": values, "asserts": asserts, "solution": [(0, len(solution))]}.get(self.span, [])
        shown = "\n\nThe code must pass these tests:\n" + "\n".join(tests) if self.asserts_in_prompt else ""
        prompt = (
            f"{problem.strip()}{shown}\n\n"
            f"Write the function `{header}` in Python, followed by {len(tests)} assert statements that test it."
        )
        meta = {"problem": problem.strip(), "tests": tests, "setup": _tidy(setup)}
        return Example(prompt, completion, tuple(spans), id, meta, marks={"copies": copies(completion, values)})

    @property
    def finds_results(self) -> bool:
        return self.executor is not None

    def with_results(self, item: Example) -> Example:
        """The item with the mark `results`: the constants, operators and names of its solution at which another one
        makes an assert fail. A solution is run once and then again for each of its places; what was found is kept.

        Raises:
            SPDError: nothing may run programs (see `executor`).
        """
        tests, setup = item.meta["tests"], item.meta["setup"]
        start, end = self._solution_at(item)
        code = item.completion[start:end]
        if (found := self._exercised.get(item.id)) is None:
            found = exercised(code, lambda program: self._passes(program, tests, setup))
            self._exercised[item.id] = found
        results = tuple((start + low, start + high) for low, high in found)
        return replace(item, marks={**item.marks, "results": results})

    def kept(self, split: Split, examples: list[Example]) -> list[Example]:
        if self.span != "results" or split == "train":  # of training examples, only the prompts are used
            return super().kept(split, examples)
        ready = [example if example.spans else self._narrowed(example) for example in examples]
        return super().kept(split, [example for example in ready if example.spans or split == "test"])

    def _narrowed(self, item: Example) -> Example:
        made = self.with_results(item)
        return replace(made, spans=made.marks.get("results", ()), prompt_spans=())

    @staticmethod
    def _solution_at(item: Example) -> Span:
        """Where in the completion the solution stands: before the asserts, or, in the reference template, behind a
        space."""
        if "solution" in item.meta:
            return 1, len(item.completion)
        return 0, len(item.completion) - sum(1 + len(test) for test in item.meta["tests"]) - 1

    def _passes(self, program: str, tests: Sequence[str], setup: str) -> bool:
        if self.executor is None:
            raise SPDError(
                f"finding the results of {self.name} means running its solutions, each with one place changed; say "
                "--allow-code-execution (in Python: set the task's executor), or choose another span"
            )
        return bool(_hasty(self.executor)(program, tests, setup))

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
        tests, setup, execute = item.meta["tests"], item.meta["setup"], self.executor
        if self.scoring == "reference":
            code, execute = reference.program(text), _hasty(self.executor)
        else:
            header, functions = signature(item.meta.get("solution", item.completion), tests)
            code = extract_code(text, functions, header)
            code = None if code is None else without_asserts(code)
        passed = False if code is None else execute(code, tests, setup)
        if passed is None and item.id not in self._unjudged:
            self._unjudged.add(item.id)
            log.warning("a wrong answer passes the tests of %s: it cannot be judged, and scores 0", item.id)
        return float(passed or False)

    def judges(self, item: Example) -> bool:
        return item.id not in self._unjudged

    def check_scorable(self) -> None:
        if self.executor is None:
            raise SPDError(
                f"scoring {self.name} means running code that a model wrote; say --allow-code-execution "
                "(in Python: set the task's executor), or leave the task out"
            )


def _hasty(executor: Executor) -> Executor:
    """The executor with the reference code's time limit, if it takes one (as `timeout_s`); else as it is."""
    run: Callable[..., bool | None] = executor
    try:
        limited = "timeout_s" in inspect.signature(run).parameters
    except (TypeError, ValueError):  # a callable without a signature, such as some builtins
        limited = False
    return functools.partial(run, timeout_s=reference.CODE_SECONDS) if limited else run


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
        yield place_of(values[-1] if values else sides[-1], text)
    elif isinstance(node, ast.BoolOp):
        for part in node.values:
            yield from _expected(part, text, functions)
    elif isinstance(node, ast.Call) and any(map(calls, node.args)):
        values = [argument for argument in node.args if not calls(argument)]
        yield place_of(values[0] if values else node.func, text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        start, _ = place_of(node, text)
        yield start, start + len("not")
    else:
        yield place_of(node.func if isinstance(node, ast.Call) else node, text)


def _called(tree: ast.AST) -> list[str]:
    """Names of the functions called anywhere in `tree`, outermost first."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node.func.id for node in calls if isinstance(node.func, ast.Name)]


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
