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
    "a verdict of another kind": ON_EVERY_DESCRIPTOR + """tell(b'{"reason": "unjudged", "passed": 1}\\n')""" + WRONG,
    "its end of the channel closed": "import os\nos.closerange(3, 64)" + WRONG,
    "closed over a question": "import os\ndef f(x): os.closerange(0, 64)",
    "another program in its place": "import os\ndef f(x): os.execv('/bin/true', ['true'])",
    "the channel's ends exchanged": """
import os
def f(x):
    for fd in range(3, 32):
        try: os.dup2(fd, 34 - fd)
        except OSError: pass
    return 5
""",
    "a question put to the judge": ON_EVERY_DESCRIPTOR + """
tell(b'["call", ["object", 0], ["list", []], ["dict", []]]\\n')
""" + WRONG,
    "answers of no form": ON_EVERY_DESCRIPTOR + r"""
tell(b'null\n[]\n{}\n["value"]\n["error"]\n["error", []]\n["error", "Gone", ""]\n["error", "exit", 0]\n4\n"\xff\n')
""" + WRONG,
    "numbers that are none": ON_EVERY_DESCRIPTOR + """tell(b'["value", NaN]\\n["value", Infinity]\\n')""" + WRONG,
    "a generator": "def f(x): yield 4",
    "a coroutine": "async def f(x): return 4",
    "an iterator that equals everything": EVERYTHING_EQUAL + """
class I(Same):
    left = 3
    def __iter__(self): return self
    def __next__(self):
        self.left -= 1
        if self.left < 0: raise StopIteration
        return Same()
def f(x): return I()
""",
    "a class that equals everything": EVERYTHING_EQUAL + """
class Meta(type):
    __eq__, __ne__, __hash__ = Same.__eq__, Same.__ne__, lambda cls: hash(4)
class f(metaclass=Meta):
    def __new__(cls, x): return cls
""",
    "a str that equals everything": EVERYTHING_EQUAL + """
class S(str):
    __eq__, __hash__ = Same.__eq__, str.__hash__
    def __str__(self): return self
def f(x): return S('5')
""",
    "a float that lies": """
class F(float):
    __eq__, __hash__ = (lambda *_: True), float.__hash__
def f(x): return F(5)
""",
    "a Decimal that lies": """
import decimal
class D(decimal.Decimal):
    __eq__ = lambda *_: True
    __reduce__ = lambda self: (D, ('5',))
D.__module__, D.__qualname__, D.__hash__ = 'decimal', 'Decimal', decimal.Decimal.__hash__
def f(x): return D(5)
""",
    "a type that says it is int": EVERYTHING_EQUAL + """
import builtins
class T(Same): pass
T.__name__ = T.__qualname__ = 'int'
T.__module__ = 'builtins'
builtins.int = T
def f(x): return T
""",
    "what isinstance says": """
import builtins
builtins.isinstance, builtins.type = (lambda *_: True), (lambda *_: int)
""" + WRONG,
    "an error with another's name": """
class E(Exception): pass
E.__name__, E.__module__ = 'StopIteration', 'builtins'
def f(x): raise E
""",
    "an error that has none": "class E(Exception):\n    def __str__(self): raise E\ndef f(x): raise E",
    "an error of every kind": "def f(x): raise ExceptionGroup('passed', [AssertionError(), StopIteration()])",
    "the function it is called by, rewritten": """
import sys
frame = sys._getframe(1)
frame.f_globals['_answer'].__code__ = (lambda request, module: None if request else 4).__code__
""" + WRONG,
    "the encoder told to keep silent": """
import sys
sys._getframe(1).f_globals.update(encode=lambda value, keep: ['object', 0], decode=lambda *_: ['name', 'f'])
""" + WRONG,
    "every line traced": """
import sys
def trace(frame, event, argument):
    for name, value in {'reason': 'passed', 'passed': 1, 'got': 4, 'error': None}.items():
        frame.f_locals[name] = value
    return trace
sys.settrace(trace)
""" + WRONG,
    "hooks at every door": """
import atexit, builtins, gc, os, sys
for place, name in ((sys, 'exit'), (os, '_exit'), (builtins, 'exit'), (sys, 'excepthook'), (sys, 'unraisablehook')):
    setattr(place, name, lambda *_: 4)
atexit.register(print, 'passed')
gc.callbacks.append(lambda *_: None)
sys.addaudithook(lambda *_: None)
class Last:
    def __del__(self): print('passed')
last = Last()
""" + WRONG,
    "asserts that are nothing": """
import ast, builtins
ast.parse = builtins.compile = lambda *_, **__: 'pass'
""" + WRONG,
    "a dict that has everything": """
class D(dict):
    __eq__ = __contains__ = lambda *_: True
    __missing__ = lambda *_: 4
def f(x): return D()
""",
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
