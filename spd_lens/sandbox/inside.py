"""What runs inside a sandbox. Never imported there: the text of this file is handed to `python -c`.

Two processes in two sandboxes. The **runner** is lost from the moment it runs the program: everything it says is what
the program chooses to say. The **judge** never runs any of the program's code: it runs the asserts, and where they
call one of the program's functions it sends the arguments to the runner and gets plain data back, on which every
comparison is then made by untouched builtins.

Standard library only, and little of it: this is started anew for every program.
"""

from __future__ import annotations

import builtins
import json
import os
import resource
import sys

TYPE_CHECKING = False  # importing `typing` and `collections.abc` would take a quarter of the start-up
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType
    from typing import Any, BinaryIO

_COLLECTIONS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
MAX_ANSWER = 16 * 2**20
"""Bytes of one answer. A longer one is an error."""
MAX_ITEMS = 1_000_000
"""Items taken from an iterator that a function returns, which may be endless."""

_VALUES = {
    ("collections", "deque"),
    ("datetime", "date"),
    ("datetime", "datetime"),
    ("datetime", "time"),
    ("datetime", "timedelta"),
    ("decimal", "Decimal"),
    ("fractions", "Fraction"),
}
"""Types of the standard library that cross as themselves, through their constructor's arguments."""


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """Value as JSON. What is not plain data stays in this process; `keep` gives a number that stands for it."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, int):
        number = int(value)
        return number if abs(number) < 2**53 else ["int", hex(number)]  # hex: no limit on digits
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes | bytearray):
        return ["bytearray" if isinstance(value, bytearray) else "bytes", value.hex()]
    if isinstance(value, range):
        return ["range", *(encode(part, keep) for part in (value.start, value.stop, value.step))]
    if isinstance(value, dict):
        return ["dict", [[encode(k, keep), encode(v, keep)] for k, v in value.items()]]
    for name, collection in _COLLECTIONS.items():
        if isinstance(value, collection):
            return [name, [encode(item, keep) for item in value]]
    cls = type(value)
    if isinstance(value, type):
        name = value.__name__
        return ["type", name] if vars(builtins).get(name) is value else ["object", keep(value)]
    if (cls.__module__, cls.__qualname__) in _VALUES:
        arguments = [list(value)] if cls.__name__ == "deque" else list(value.__reduce__()[1])
        return ["value", cls.__module__, cls.__qualname__, [encode(argument, keep) for argument in arguments]]
    if hasattr(cls, "__next__"):
        items = [item for item, _ in zip(value, range(MAX_ITEMS), strict=False)]
        return ["iterator", [encode(item, keep) for item in items]]
    return ["object", keep(value)]


def decode(data: Any, fetch: Callable[[int], Any]) -> Any:
    """The inverse of `encode`. Builds plain data only, whoever wrote `data`; raises on anything unknown."""
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise ValueError("unknown answer")
        return data
    match data:
        case ["int", str(digits)]:
            return int(digits, 16)
        case ["complex", real, imag]:
            return complex(float(real), float(imag))
        case ["bytes", str(digits)]:
            return bytes.fromhex(digits)
        case ["bytearray", str(digits)]:
            return bytearray.fromhex(digits)
        case ["range", *parts]:
            return range(*(decode(part, fetch) for part in parts))
        case ["dict", list(items)]:
            return {decode(key, fetch): decode(item, fetch) for key, item in items}
        case [str(name), list(items)] if name in _COLLECTIONS:
            return _COLLECTIONS[name]([decode(item, fetch) for item in items])
        case ["value", str(module), str(name), list(arguments)] if (module, name) in _VALUES:
            return getattr(__import__(module), name)(*(decode(argument, fetch) for argument in arguments))
        case ["type", str(name)] if isinstance(kind := getattr(builtins, name, None), type):
            return kind
        case ["iterator", list(items)]:
            return iter([decode(item, fetch) for item in items])
        case ["object", int(number)]:
            return fetch(number)
    raise ValueError("unknown answer")


# --- the runner ------------------------------------------------------------------------------------------------------


def run(order: dict[str, Any], requests: BinaryIO, answers: BinaryIO) -> None:
    """Runs the program, then answers calls of its functions until the judge asks no more.

    It is a module that is imported, not a script: what stands under `if __name__ == "__main__"` does not run.
    """
    module = type(sys)("program")
    module.__file__ = "/scratch/program.py"
    sys.argv = [module.__file__]
    sys.modules |= {"program": module, "__main__": module}  # for what looks classes up by their module's name
    exec(compile(order["program"], "<program>", "exec", dont_inherit=True), module.__dict__)
    kept: list[Any] = []

    def keep(value: Any) -> int:
        for number, known in enumerate(kept):
            if known is value:
                return number
        kept.append(value)
        return len(kept) - 1

    for line in requests if order["tested"] else ():
        try:
            reply = ["value", encode(_answer(decode(json.loads(line), kept.__getitem__), module), keep)]
            text = json.dumps(reply)
        except Exception as error:
            builtin = next(cls.__name__ for cls in type(error).__mro__ if cls.__module__ == "builtins")
            text = json.dumps(["error", builtin, f"{type(error).__name__}: {error}"[:1000]])
        answers.write(text.encode() + b"\n")
        answers.flush()


def _answer(request: tuple[Any, ...], module: ModuleType) -> Any:
    match request:
        case ["name", name]:
            if not hasattr(module, name):
                raise NameError(f"name {name!r} is not defined")
            return getattr(module, name)
        case ["call", function, arguments, keywords]:
            return function(*arguments, **keywords)
        case ["get", target, name]:
            return getattr(target, name)
        case ["set", target, name, value]:
            setattr(target, name, value)
            return None
        case ["iterate", target]:
            return iter(target)
    raise ValueError("unknown request")


# --- the judge -------------------------------------------------------------------------------------------------------


class Gone(BaseException):
    """The runner has ended. Not an `Exception`: a test that expects one must not take it for that."""


class Program:
    """The judge's end of the line to the program."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO) -> None:
        self.requests, self.answers = requests, answers
        self.objects: dict[int, Remote] = {}
        self.gone = False

    def ask(self, *request: Any) -> Any:
        """The program's answer as plain data; its exceptions are raised as the builtin exceptions they derive from, but
        for those that end a loop: as in a generator they are `RuntimeError`s."""
        question = json.dumps(encode(request, _own)).encode() + b"\n"
        try:
            self.requests.write(question)
            self.requests.flush()
            line = self.answers.readline(MAX_ANSWER)
        except BrokenPipeError:
            line = b""
        if not line:
            self.gone = True
            raise Gone
        if not line.endswith(b"\n"):
            raise ValueError("the program's answer is too long, or broken off")
        kind, *content = json.loads(line)
        if kind == "value":
            return decode(content[0], self.fetch)
        known = getattr(builtins, str(content[0]), None)
        ordinary = isinstance(known, type) and issubclass(known, Exception)
        raise _exception(known if ordinary else RuntimeError, str(content[1])[:1000])

    def fetch(self, number: int) -> Remote:
        return self.objects.setdefault(number, Remote(self, number))


def _exception(cls: Any, message: str) -> Exception:
    if issubclass(cls, StopIteration | StopAsyncIteration):  # would end the loops of a test as if all had been compared
        return RuntimeError(message)
    try:
        return cls(message)
    except TypeError:  # UnicodeDecodeError and the like want more arguments
        return RuntimeError(message)


class Remote:
    """Stands in the judge for an object of the program that is not plain data: a function, an instance of its class.

    Equal to itself alone: what the program's own `__eq__` says is not asked.
    """

    __slots__ = ("_number", "_program")

    def __init__(self, program: Program, number: int) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._program.ask("call", self, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        return self._program.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.ask("set", self, name, value)

    def __iter__(self) -> Iterator[Any]:
        return self._program.ask("iterate", self)


def _own(value: Any) -> int:
    if isinstance(value, Remote):
        return int(object.__getattribute__(value, "_number"))
    raise TypeError(f"a test hands the program a {type(value).__name__}, which cannot leave the judge's process")


def judge(order: dict[str, Any], program: Program) -> dict[str, Any]:
    """Runs the asserts. Nothing that the program sends is ever executed, unpickled or asked for its opinion."""
    passed, test = 0, "the set-up"
    try:
        names = _names(order, lambda name: program.ask("name", name))
        _execute(order["setup"], names)
        for test in order["tests"]:
            _execute(test, names)
            if program.gone:  # and the test has a bare `except`
                raise Gone
            passed += 1
        return {"reason": "passed", "passed": passed, "detail": ""}
    except Gone:
        reason, message = "exited", "the program ended before it had answered"
    except AssertionError as error:
        reason, message = "failed", str(error)
    except MemoryError as error:
        reason, message = "memory", str(error)
    except BaseException as error:
        reason, message = "error", str(error) if str(error).startswith(type(error).__name__) else repr(error)
    return {"reason": reason, "passed": passed, "detail": f"{test}: {message}" if message else test}


def _names(order: dict[str, Any], function: Callable[[str], Any]) -> dict[str, Any]:
    """The names that the tests begin with; `function` gives what stands for one of the program's."""
    names: dict[str, Any] = {"__name__": "tests"}
    names |= {module: __import__(module) for module in order["modules"]}
    return names | {name: function(name) for name in order["functions"]}


def _execute(statements: str, names: dict[str, Any]) -> None:
    exec(compile(statements, "<test>", "exec", dont_inherit=True), names)


class Nothing:
    """In place of all that a program is and answers, to find tests that say nothing of it.

    Whatever is done with it gives it again. It has no items, and compares as NaN does.
    """

    steps = 10_000
    """Operations on all of them together, so that no loop of a test waits for an answer that never comes."""

    def _again(self, *_: Any, **__: Any) -> Any:
        Nothing.steps -= 1
        if Nothing.steps < 0:
            raise RuntimeError("a test that does not end")
        return self

    def _no(self, *_: Any) -> bool:
        return self._again() is None

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __bool__(self) -> bool:
        raise TypeError("neither true nor false")

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself looks for
            raise AttributeError(name)
        return self._again()

    def __setattr__(self, name: str, value: Any) -> None:
        self._again()

    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _no
    __hash__ = object.__hash__
    __call__ = __getitem__ = __setitem__ = __neg__ = __abs__ = __round__ = __or__ = __and__ = _again
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _again
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _again


class Same(Nothing):
    """As `Nothing`, but equal to itself: what both sides of a comparison are if the program gives both."""

    def _itself(self, other: object) -> bool:
        return self._again() is other

    def __sub__(self, other: object) -> Any:
        return 0 if self._itself(other) else self

    def __float__(self) -> float:
        return 7.236e87  # no value that anybody expects

    __eq__ = __le__ = __ge__ = _itself
    __hash__ = object.__hash__


def decides(order: dict[str, Any]) -> bool:
    """Whether one of the tests fails both where all answers are `Nothing` and where all are the `Same`.

    Otherwise a wrong program passes them all: they compare in a loop over the program's items, of which there need be
    none, ask only that something is not so, or compare the program with itself or with a helper that the data lack.
    """
    stand_ins = []
    for stand_in in (Nothing(), Same()):
        names = _names(order, {name: stand_in for name in order["functions"]}.__getitem__)
        if _holds(order["setup"], names):
            stand_ins.append(names)
    return not all(any([_holds(test, names) for names in stand_ins]) for test in order["tests"])


def _holds(statements: str, names: dict[str, Any]) -> bool:
    try:
        _execute(statements, names)
    except BaseException:  # SystemExit, too
        return False
    return True


def refuse_calls(program: bytes) -> None:
    """Puts this process and its descendants under a filter of system calls (see `seccomp`)."""
    import ctypes  # here, as the judge does without

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    filter = Filter(len(program) // 8, program)
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, mode_filter, ctypes.byref(filter), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel does not take the filter of system calls")


def main() -> None:
    """Reads its role, runner or judge, from standard input, and plays it."""
    order = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # input() finds an end, and the order's file can't be written to
    for name, value in order["limits"].items():
        hard = value + 1 if name == "RLIMIT_CPU" else value  # at the first the kernel says why, at the second it kills
        resource.setrlimit(getattr(resource, name), (value, hard))
    reader, writer = os.fdopen(order["read"], "rb"), os.fdopen(order["write"], "wb")
    if order["role"] == "program":
        refuse_calls(bytes.fromhex(order["filter"]))
        writer.write(b"ready\n")
        writer.flush()
        if not order["tested"] or reader.readline(16) == b"go\n":
            run(order, reader, writer)
        return
    verdict = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a test prints is no verdict
    if reader.readline(16) != b"ready\n":
        return
    verdict.write(b"ready\n")
    verdict.flush()  # fails if the caller is gone, and then the program need not start
    result = {"reason": "unjudged", "passed": 0, "detail": "an answer that says nothing passes the tests"}
    if decides(order):
        writer.write(b"go\n")
        writer.flush()
        result = judge(order, Program(writer, reader))
    verdict.write(json.dumps(result).encode() + b"\n")
    verdict.flush()
