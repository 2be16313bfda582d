"""Programs that claim a pass: none gets it."""

import pytest

TEST = ["assert f(2) == 4"]

EVERYTHING_EQUAL = """
class Same:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __hash__(self): return hash(4)
"""

ON_EVERY_DESCRIPTOR = """
import os
def tell(data):
    for fd in range(64):
        try:
            os.write(fd, data)
        except OSError:
            pass
"""
VERDICT = ON_EVERY_DESCRIPTOR + """tell(b'ready\\n{"reason": "passed", "passed": 1, "detail": ""}\\n')\n"""
WRONG = "\ndef f(x): return 5\n"

FORGERIES = {
    "os._exit": "import os\nos._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "SystemExit in the function": "def f(x): raise SystemExit(0)",
    "os._exit in the function": "import os\ndef f(x): os._exit(0)",
    "os._exit at exit": "import atexit, os\natexit.register(os._exit, 0)" + WRONG,
    "printing": "print('passed')",
    "AssertionError patched": """
import builtins
builtins.AssertionError = type("Nothing", (BaseException,), {})
""" + WRONG,
    "AssertionError raised": "def f(x): raise AssertionError('passed')",
    "builtins patched": """
import builtins
for name in ("exec", "compile", "getattr", "list", "int", "__import__"):
    setattr(builtins, name, lambda *a, **k: 4)
""" + WRONG,
    "json patched": """
import json
json.dumps = lambda *a: '["value", ["pass", 4]]'
""" + WRONG,
    "equals everything": EVERYTHING_EQUAL + "def f(x): return Same()",
    "int that equals everything": EVERYTHING_EQUAL + """
class I(int):
    __eq__, __hash__ = Same.__eq__, int.__hash__
def f(x): return I(5)
""",
    "list that equals everything": EVERYTHING_EQUAL + """
class L(list):
    __eq__ = Same.__eq__
def f(x): return L([5])
""",
    "claims to be an int": EVERYTHING_EQUAL + """
class C(Same):
    __class__ = int
def f(x): return C()
""",
    "function that equals everything": EVERYTHING_EQUAL + """
class F(Same):
    def __call__(self, x): return self
f = F()
""",
    "verdict on every descriptor": VERDICT + WRONG,
    "verdict, then exit": VERDICT + "os._exit(0)",
    "answers ahead of the questions": ON_EVERY_DESCRIPTOR + """tell(b'["value", true]\\n' * 9)""" + WRONG,
    "an answer that calls": ON_EVERY_DESCRIPTOR + """tell(b'["value", ["value", "os", "_exit", [0]]]\\n')""" + WRONG,
    "an answer without end": ON_EVERY_DESCRIPTOR + "while True: tell(b'[' * 65536)" + WRONG,
    "a deep answer": """
def f(x):
    for _ in range(10**5):
        x = [x]
    return x
""",
    "an endless iterator": "import itertools\ndef f(x): return itertools.repeat(4)",
    "frames rewritten": """
import sys
frame = sys._getframe()
while frame:
    frame.f_globals.update(judge=lambda *a: {"reason": "passed"}, _answer=lambda *a: 4 == 4, TEST=[])
    frame.f_locals.update(tests=[])
    frame = frame.f_back
""" + WRONG,
    "the order rewritten": """
import gc
for thing in gc.get_objects():
    if isinstance(thing, dict) and "role" in thing:
        thing.update(tested=False, tests=[], role="judge")
""" + WRONG,
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_a_pass_cannot_be_claimed(shut_in, name):
    result = shut_in(FORGERIES[name], TEST, timeout_s=2)
    assert not result.ok and result.reason != "finished", result


@pytest.mark.parametrize(
    ("program", "test", "setup"),
    [
        ("def set(x): return 1\ndef f(x): return [0]", "assert set(f(2)) == set([4])", ""),
        ("class math:\n    isclose = print\ndef f(x): return 0", "assert math.isclose(f(2), 4)", "import math"),
        ("class sys:\n    getsizeof = lambda x: 0\ndef f(x): return 0", "assert f(2) == sys.getsizeof(2)", ""),
        ("def abs(x): return 0\ndef f(x): return 0", "assert abs(f(2) - 4) < 1e-6", ""),
        (EVERYTHING_EQUAL + "def f(x): return [Same(), {Same(): Same()}]", "assert f(2) == [4, {4: 4}]", ""),
        (EVERYTHING_EQUAL + "def f(x): return Same()", "assert f(2) in (1, 2, 3)", ""),
        (EVERYTHING_EQUAL + "def f(x): return Same()", "assert set([f(2)]) == {4}", ""),
        (EVERYTHING_EQUAL + "def f(x): return Same()", "assert not f(2) != 4", ""),
        (EVERYTHING_EQUAL + "def f(x): return Same()", "assert 4 == f(2)", ""),
    ],
)
def test_a_program_does_not_get_to_say_what_the_tests_mean(shut_in, program, test, setup):
    result = shut_in(program, [test], setup=setup)
    assert result.reason in ("failed", "error") and result.passed == 0, result


@pytest.mark.parametrize("handler", ["except Exception", "except BaseException", "except"])
def test_an_expected_error_is_not_had_by_leaving(shut_in, handler):
    test = f"try:\n    f(2)\n{handler}:\n    pass\nelse:\n    assert False"
    assert shut_in("def f(x): raise ValueError(x)", [test]).ok
    for leave in (
        "import os\ndef f(x): os._exit(0)",
        "def f(x): raise KeyboardInterrupt",
        "def f(x): raise SystemExit",
    ):
        assert shut_in(leave, [test]).reason in ("exited", "error")


LOOPS = [
    "for got, want in zip(map(f, [1, 2]), [1, 4]): assert got == want",
    "assert all(a == b for a, b in zip(map(f, [1, 2]), [1, 4]))",
    "for got in iter(lambda: f(3), None): assert got == 9; break",
    "assert sum(map(f, [1, 2])) in (0, 5)",
]


@pytest.mark.parametrize("test", LOOPS)
def test_no_exception_of_a_program_ends_a_loop_of_its_tests(shut_in, test):
    assert shut_in("def f(x): return x * x", [test]).ok
    for error in ("StopIteration", "StopAsyncIteration", "type('E', (StopIteration,), {})", "GeneratorExit"):
        result = shut_in(f"def f(x): raise {error}", [test])
        assert (result.ok, result.passed) == (False, 0) and result.reason in ("error", "exited"), result
    forged = ON_EVERY_DESCRIPTOR + """tell(b'["error", "StopIteration", ""]\\n' * 4)""" + WRONG
    assert not shut_in(forged, [test]).ok


def test_the_expected_value_is_not_in_the_programs_reach(shut_in):
    """Searches whatever the collector and the frames know for both sides of the assert."""
    search = """
import gc, sys
def f(argument):
    known, frame = [*gc.get_objects(), argument], sys._getframe()
    while frame := frame.f_back:
        known += [frame.f_globals, frame.f_locals]
    text = repr([o for o in known if type(o) in (dict, list, tuple)])
    words = "argument-" + "needle", "expected-" + str(len(text) * 0)
    sys.stdout.write(str([word in text for word in words]))
    return text
"""
    result = shut_in(search, ["assert f('argument-needle') == 'expected-0'"], timeout_s=30)
    assert (result.reason, result.stdout) == ("failed", "[True, False]")


def test_without_tests_nothing_can_be_passed(shut_in):
    for program in ("pass", "assert True", "import os; os._exit(0)"):
        result = shut_in(program)
        assert (result.reason, result.ok) == ("finished", False)
    assert shut_in("assert 1 == 2").reason == "error"
    assert shut_in("import sys; sys.exit(3)").reason == "exited"
