"""Runs Python programs that a model wrote, and finds out whether they pass their tests.

`run_python(program, tests=[...])` treats the program as hostile. It runs in a sandbox (`mechanisms`, `seccomp`): no
network, no home directory, a read-only file system but for an empty scratch directory, another user, and limits on CPU
and wall time, memory, processes, file and output size. By default it may have one process with one thread.

**A pass is not the program's to claim.** Exit codes, prints and secrets are no proof: the program could call
`os._exit(0)`, print whatever the caller waits for, patch `assert`'s surroundings, return objects that equal
everything, or dig a secret out of its interpreter. So the asserts run elsewhere: in a *judge*, a second process in a
second sandbox that never executes the program's code. Where an assert calls one of the program's functions, the
arguments travel to the program and plain data travels back (`inside`), and the comparison happens in the judge. The
expected values never enter the program's process, and there is no secret to find.

What remains:

- A program that knows the answers passes: it may have seen the asserts in its prompt, and can look arguments up in a
  table. That is a matter of the task, not of the sandbox.
- `assert f(x)` holds for any truthy answer, and where both sides of a comparison call the program, it answers both.
- The kernel is shared: a hole in it is a hole in this. Users with such worries use a virtual machine around it all.
- A program can waste what its limits allow, can time itself, and has a hand in every result but a pass.
- Time is limited as CPU time; a program that only sleeps is ended much later (`WALL_FACTOR`).
- The data set is trusted: its tests run in the judge's sandbox, but what they assert is what counts.

And the price: only plain data crosses (numbers, strings, bytes, containers, iterators, dates, `Decimal`, `Fraction`).
Other objects stay in the program and are represented by a handle that can be called, whose attributes can be read
and set, and that equals only itself. A test cannot hand the program a function, nor see that it changed an argument
in place. Only the standard library can be imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache

from spd_lens.errors import SPDError
from spd_lens.sandbox import mechanisms
from spd_lens.sandbox.names import names_of
from spd_lens.sandbox.trial import SandboxResult, Trial

__all__ = ["SandboxResult", "available", "run_python", "unavailable"]

WALL_FACTOR = 8
"""Wall time that a program may take by default, in terms of its CPU time."""

_PROBE = """
import os
try:
    open("/usr/probe", "w")
except OSError:
    pass
else:
    raise SystemExit("the file system can be written to")
known = {"bin", "dev", "lib", "lib32", "lib64", "old", "proc", "python", "sbin", "scratch", "usr"}
in_sight = set(os.listdir("/")) - known
in_sight.update(*(os.listdir(place) for place in ("/old", "/proc") if os.path.exists(place)))
if in_sight:
    raise SystemExit(f"the host's files are in sight: {sorted(in_sight)[:5]}")
open("probe", "w").write("scratch")
"""


def run_python(
    program: str,
    tests: Sequence[str] = (),
    *,
    setup: str = "",
    functions: Iterable[str] | None = None,
    timeout_s: float = 15.0,
    wall_s: float | None = None,
    memory_mb: int = 512,
    processes: int = 1,
    scratch_mb: int = 16,
    output_kb: int = 256,
    mechanism: str | None = None,
) -> SandboxResult:
    """Runs a hostile program, and trusted tests of its functions.

    Args:
        program: Python source, run as if it were imported (`__name__` is not `__main__`), with an empty standard input.
        tests: Statements with asserts, from the data set; run one after the other, up to the first that fails.
        setup: Statements that precede them (imports, objects that the tests share); may use the program's classes.
        functions: Names that the tests take from the program. By default, whatever name they use without defining or
            importing it; if there is none, the builtin that every test calls, which the program then redefines.
        timeout_s: CPU time of each process, so that a verdict does not depend on what else the machine is doing; in
            whole seconds, rounded up.
        wall_s: Wall time, for programs that sleep. None: `WALL_FACTOR` times `timeout_s`, with which a program that
            works gets all of its CPU time on a machine with as many others for each core.
        memory_mb: Address space of each process. The scratch directory comes on top.
        processes: Processes and threads that the program may have, itself included.
        scratch_mb: Size of the scratch directory.
        output_kb: Bytes printed, both streams together, after which the program is stopped.
        mechanism: `bubblewrap` or `unshare`; by default the first that works.

    Raises:
        SPDError: For tests that are not Python, hold no assert or call nothing of the program, for limits that make
            no sense, and if no sandbox works here. Never for what the program does.
    """
    if not isinstance(program, str):
        raise SPDError(f"program must be Python source as a string, but is a {type(program).__name__}")
    wall_s = timeout_s * WALL_FACTOR if wall_s is None else wall_s
    times = {"timeout_s": timeout_s, "wall_s": wall_s}
    _check_limits(**times, memory_mb=memory_mb, processes=processes, scratch_mb=scratch_mb, output_kb=output_kb)
    asked, modules = names_of(tests, setup, functions) if tests else ([], [])
    mechanism = _choose(mechanism)
    limits = {
        "RLIMIT_AS": memory_mb * 2**20,
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": math.ceil(timeout_s),
        "RLIMIT_FSIZE": scratch_mb * 2**20,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_NOFILE": 32,
        "RLIMIT_NPROC": processes + mechanisms.KEEPERS[mechanism],
    }
    with Trial(mechanism, limits, wall_s, scratch_mb, output_kb * 1024) as trial:
        return trial.run(program, tests, setup, asked, modules)


def available() -> str | None:
    """The mechanism that is used here, after it has been tried; `None` if there is none (see `unavailable`)."""
    return next((name for name in mechanisms.NAMES if not _problem(name)), None)


def unavailable() -> dict[str, str]:
    """For every mechanism that does not work here, why."""
    return {name: problem for name in mechanisms.NAMES if (problem := _problem(name))}


@cache
def _problem(mechanism: str) -> str:
    """Why a mechanism does not work here, found out by trying it; empty if it does."""
    problem = mechanisms.missing(mechanism)
    if problem:
        return problem
    try:
        with Trial(mechanism, {}, 60.0, 1, 2**16) as trial:
            result = trial.run(_PROBE)
    except SPDError as error:
        return str(error)
    return "" if result.reason == "finished" else f"it does not shut in: {result.stderr.strip() or result.reason}"


def _choose(mechanism: str | None) -> str:
    if mechanism is not None and mechanism not in mechanisms.NAMES:
        raise SPDError(f"there is no sandbox mechanism {mechanism!r}; choose {' or '.join(mechanisms.NAMES)}")
    chosen = mechanism or available()
    if chosen is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in unavailable().items())
        raise SPDError(f"generated code is not run, as no sandbox works on this machine ({reasons})")
    if _problem(chosen):
        raise SPDError(f"the sandbox mechanism {chosen!r} does not work on this machine: {_problem(chosen)}")
    return chosen


def _check_limits(**limits: float) -> None:
    for name, value in limits.items():
        whole = not name.endswith("_s")
        if isinstance(value, bool) or not (isinstance(value, int) if whole else isinstance(value, int | float)):
            raise SPDError(f"{name} must be a {'whole ' if whole else ''}number, but is {value!r}")
        if not 0 < value < math.inf:
            raise SPDError(f"{name} must be above 0 and finite, but is {value!r}")
    if limits["memory_mb"] < 64:
        raise SPDError(f"Python itself needs 64 MB, but memory_mb is {limits['memory_mb']}")
