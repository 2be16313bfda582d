"""One program's run: starts the sandboxes, drains what they print, keeps the time, and clears everything away."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from spd_lens.errors import SPDError
from spd_lens.sandbox import bubblewrap
from spd_lens.sandbox.seccomp import blocking_filter

_START_SECONDS = 60.0
"""Time for the sandbox to come up on a busy machine. A program's own time counts from then on."""
_END_SECONDS = 10.0
"""Time for a program that has ended to be cleared away, so that its exit code is known."""
_GRACE_SECONDS = 0.3
"""Time for a program to end by itself once the tests are over, before it is killed."""
_SHOWN = 8_000
"""Bytes of each stream that a result keeps."""


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended.

    Except for a pass, a program can have a hand in `reason`; the texts are its own, control characters included: escape
    them where they are shown.
    """

    reason: str
    """`passed`: every assert ran and held. `finished`: no tests were given, and it ended without an error. Otherwise
    `failed` (an assert did not hold), `error` (an exception), `exited` (it ended before it had answered every test),
    `timeout` (CPU or wall time), `memory`, `output` (too much of it), or `unjudged`: a wrong answer passes the tests,
    so that the program was not run (see `inside.decides`)."""
    passed: int
    """Tests that held, in order, before the first that did not."""
    detail: str
    """The test that did not hold, and the error."""
    stdout: str
    """The beginning of what the program printed."""
    stderr: str
    """The end of what it printed there: the traceback, if there is one."""
    seconds: float
    """Wall time from the program's start."""

    @property
    def ok(self) -> bool:
        """Whether every assert ran and held. Never true of a program without tests: it can only say so itself."""
        return self.reason == "passed"


class Trial:
    """The processes and pipes of one run. A context manager: nothing of it outlives the `with`."""

    def __init__(self, limits: Mapping[str, int], wall_s: float, scratch_mb: int, max_output: int) -> None:
        self.limits, self.wall_s = dict(limits), wall_s
        self.scratch_mb, self.max_output = scratch_mb, max_output
        self._stack = ExitStack()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._streams = selectors.DefaultSelector()
        self._read: dict[str, bytearray] = {}
        self._printed = 0

    def __enter__(self) -> Trial:
        self._stack.enter_context(self._streams)
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._stack.close()

    def run(
        self,
        program: str,
        tests: Sequence[str] = (),
        setup: str = "",
        functions: Sequence[str] = (),
        modules: Sequence[str] = (),
    ) -> SandboxResult:
        """Runs the program and, if there are tests, the judge beside it."""
        requests, answers = self._pipe(), self._pipe()
        order: dict[str, Any] = {"program": program, "tested": bool(tests), "filter": blocking_filter().hex()}
        self._start("program", requests[0], answers[1], order)
        if tests:
            order = {"tests": list(tests), "setup": setup, "functions": list(functions), "modules": list(modules)}
            self._start("judge", answers[0], requests[1], order)
            verdict: IO[bytes] = self._output("judge")
        else:
            verdict = answers[0]
        for end in (requests[0], requests[1], answers[1], *([answers[0]] if tests else [])):
            end.close()
        self._watch("verdict", verdict)
        self._await_start()
        began = time.monotonic()
        reason = self._drain(began + self.wall_s, "verdict" if tests else None)
        seconds = time.monotonic() - began
        passed, detail = 0, ""
        if not reason and tests:
            reason, passed, detail = self._judged(len(tests))
        if reason in ("passed", "failed", "error", "memory"):  # it is asked no more, so it should end by itself
            with suppress(subprocess.TimeoutExpired):
                self._processes["program"].wait(_GRACE_SECONDS)
        if reason in ("", "exited"):
            reason, detail = self._ended(detail, tested=bool(tests))
        self._kill()
        stdout, stderr = _text(self._read["program stdout"][:_SHOWN]), _text(self._read["program stderr"][-_SHOWN:])
        return SandboxResult(reason, passed, detail, stdout, stderr, seconds)

    def _start(self, role: str, reader: IO[bytes], writer: IO[bytes], order: dict[str, Any]) -> None:
        order |= {"role": role, "limits": self.limits, "read": reader.fileno(), "write": writer.fileno()}
        command = bubblewrap.command(["-c", _inside()], scratch_mb=self.scratch_mb)
        with tempfile.TemporaryFile() as stdin:  # a pipe would block on a long program
            stdin.write(json.dumps(order).encode())
            stdin.seek(0)
            try:
                process = bubblewrap.start(command, stdin, (reader.fileno(), writer.fileno()))
            except OSError as error:
                raise SPDError(f"the sandbox could not be started: {error}") from error
        self._processes[role] = self._stack.enter_context(process)
        assert process.stderr is not None  # it was asked for
        self._watch(f"{role} stderr", process.stderr)
        if role == "program":
            self._watch(f"{role} stdout", self._output(role))

    def _output(self, role: str) -> IO[bytes]:
        stdout = self._processes[role].stdout
        assert stdout is not None  # it was asked for
        return stdout

    def _pipe(self) -> tuple[IO[bytes], IO[bytes]]:
        reader, writer = os.pipe()
        return self._stack.enter_context(os.fdopen(reader, "rb")), self._stack.enter_context(os.fdopen(writer, "wb"))

    def _watch(self, name: str, stream: IO[bytes]) -> None:
        os.set_blocking(stream.fileno(), False)
        self._streams.register(stream, selectors.EVENT_READ, name)
        self._read[name] = bytearray()

    def _await_start(self) -> None:
        """Waits for the sandboxes to say that they are up. The program's does so before it has run any of it."""
        deadline = time.monotonic() + _START_SECONDS
        while b"\n" not in self._read["verdict"] and self._printed <= self.max_output:
            if not self._step(deadline) or "verdict" not in self._open():
                said = _text(self._read["program stderr"] + self._read.get("judge stderr", b"")).strip()
                problem = said.splitlines()[-1] if said else f"no answer within {_START_SECONDS:g} s"
                raise SPDError(f"the sandbox did not start: {problem}")

    def _drain(self, deadline: float, until: str | None) -> str:
        """Reads until a stream, or all of them, is closed; returns `output` or `timeout` if that limit came first."""
        while self._open() if until is None else until in self._open():
            if self._printed > self.max_output:
                return "output"
            if not self._step(deadline):
                return "timeout"
        return ""

    def _step(self, deadline: float) -> bool:
        """Reads what there is; false once the deadline has passed."""
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        for key, _ in self._streams.select(left):
            with suppress(BlockingIOError):
                chunk = os.read(key.fd, 65536)
                if not chunk:
                    self._streams.unregister(key.fileobj)
                self._printed += len(chunk)
                self._read[key.data] += chunk
        return True

    def _open(self) -> set[str]:
        return {key.data for key in self._streams.get_map().values()}

    def _judged(self, tests: int) -> tuple[str, int, str]:
        lines = self._read["verdict"].splitlines()
        if len(lines) < 2:  # out of memory or CPU time over an answer
            return "error", 0, "the judge ended over an answer of the program, without a verdict"
        verdict = json.loads(lines[1])
        if verdict["reason"] == "passed" and verdict["passed"] != tests:
            raise SPDError(f"the judge reports a pass with {verdict['passed']} of {tests} tests; this is a bug")
        return verdict["reason"], verdict["passed"], verdict["detail"].encode(errors="replace").decode()

    def _ended(self, detail: str, *, tested: bool) -> tuple[str, str]:
        """Why a program that is no longer there ended."""
        with suppress(subprocess.TimeoutExpired):
            self._processes["program"].wait(_END_SECONDS)
        self._drain(time.monotonic() + _END_SECONDS, "program stderr")
        code = self._processes["program"].returncode
        if code == 0 and not tested:
            return "finished", ""
        if code == 128 + signal.SIGXCPU:
            return "timeout", ""
        last = (_text(self._read["program stderr"]).strip().splitlines() or [""])[-1]
        if last.startswith("MemoryError"):
            return "memory", last
        if code == 1 and last:
            return "error", last
        return "exited", detail or f"exit code {code}"

    def _kill(self) -> None:
        running = [process for process in self._processes.values() if process.poll() is None]
        for process in running:
            bubblewrap.kill(process)
        deadline = time.monotonic() + _END_SECONDS
        while self._open() and self._step(deadline):
            pass  # reads the rest, so that nothing waits for a full pipe
        for process in running:
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _text(data: bytes | bytearray) -> str:
    return bytes(data).decode("utf-8", errors="replace")


@cache
def _inside() -> str:
    """The text of `inside`: it cannot be imported where it runs, as none of our files are there."""
    return Path(__file__).with_name("inside.py").read_text(encoding="utf-8") + "\n\nmain()\n"
