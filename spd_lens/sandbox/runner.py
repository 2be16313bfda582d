"""`run_python`: limits, a sandbox that was tried on this machine, and one `Trial`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache

from spd_lens.errors import SPDError
from spd_lens.sandbox import bubblewrap
from spd_lens.sandbox.names import names_of
from spd_lens.sandbox.trial import SandboxResult, Trial

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
    if problem := unavailable():
        raise SPDError(f"generated code is not run, as the sandbox does not work on this machine: {problem}")
    limits = {
        "RLIMIT_AS": memory_mb * 2**20,
        "RLIMIT_CORE": 0,
        "RLIMIT_CPU": math.ceil(timeout_s),
        "RLIMIT_FSIZE": scratch_mb * 2**20,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_NOFILE": 32,
        "RLIMIT_NPROC": processes + bubblewrap.KEEPERS,
        "RLIMIT_SIGPENDING": 64,  # so many timers, too
    }
    with Trial(limits, wall_s, scratch_mb, output_kb * 1024) as trial:
        return trial.run(program, tests, setup, asked, modules)


def passes_tests(code: str, tests: Sequence[str], setup: str, timeout_s: float = 15.0) -> bool | None:
    """Whether hostile `code` passes trusted `tests`; what `CodeTask.executor` is set to with --allow-code-execution.

    None where a wrong answer passes the tests, so that they cannot judge the code.
    """
    result = run_python(code, tests, setup=setup, timeout_s=timeout_s)
    return None if result.reason == "unjudged" else result.ok


def available() -> bool:
    """Whether the sandbox works here, after it has been tried (see `unavailable`)."""
    return not unavailable()


@cache
def unavailable() -> str:
    """Why the sandbox does not work here, found out by trying it; empty if it does."""
    if problem := bubblewrap.missing():
        return problem
    try:
        with Trial({}, 60.0, 1, 2**16) as trial:
            result = trial.run(_PROBE)
    except SPDError as error:
        return str(error)
    return "" if result.reason == "finished" else f"it does not shut in: {result.stderr.strip() or result.reason}"


def _check_limits(**limits: float) -> None:
    for name, value in limits.items():
        whole = not name.endswith("_s")
        if isinstance(value, bool) or not (isinstance(value, int) if whole else isinstance(value, int | float)):
            raise SPDError(f"{name} must be a {'whole ' if whole else ''}number, but is {value!r}")
        if not 0 < value < math.inf:
            raise SPDError(f"{name} must be above 0 and finite, but is {value!r}")
    if limits["memory_mb"] < 64:
        raise SPDError(f"Python itself needs 64 MB, but memory_mb is {limits['memory_mb']}")
