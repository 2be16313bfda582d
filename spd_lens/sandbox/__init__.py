"""Runs Python programs that a model wrote, and finds out whether they pass their tests.

`run_python(program, tests=[...])` treats the program as hostile. It runs in a sandbox (`bubblewrap`, `seccomp`): no
network, no home directory, a read-only file system but for an empty scratch directory, another user, and limits on CPU
and wall time, memory, processes, file and output size. By default it may have one process with one thread.

**A pass is not the program's to claim.** Exit codes, prints and secrets are no proof: the program could call
`os._exit(0)`, print whatever the caller waits for, patch `assert`'s surroundings, return objects that equal
everything, or dig a secret out of its interpreter. So the asserts run elsewhere: in a *judge*, a second process in a
second sandbox that never executes the program's code. Where an assert calls one of the program's functions, the
arguments travel to the program and plain data travels back (`inside`), and the comparison happens in the judge. The
expected values never enter the program's process, and there is no secret to find.

**Nor is it the tests' to give away.** Before the program starts, the judge runs the tests on answers that say nothing,
such as one that has no items and compares as NaN does, or one that is all answers at once. Where such answers pass all
tests, so would a wrong program: an assert in a loop over the program's items, `assert not f(2) > 4`, a comparison with
a helper that the data lack. The result is then `unjudged`, and no pass. None of MBPP's 974 problems is.

What remains:

- A program that knows the answers passes: it may have seen the asserts in its prompt, and can look arguments up in a
  table. That is a matter of the task, not of the sandbox.
- `assert f(x)` holds for any truthy answer, and `assert f(x) > 3` for infinity. Where some tests decide something,
  the others may be weaker.
- The kernel is shared: a hole in it is a hole in this. Users with such worries use a virtual machine around it all.
- A program can waste what its limits allow, can time itself, and has a hand in every result but a pass.
- Time is limited as CPU time; a program that only sleeps is ended much later (`WALL_FACTOR`).
- The data set is trusted: its tests run in the judge's sandbox, but what they assert is what counts.

And the price: only plain data crosses (numbers, strings, bytes, containers, iterators, dates, `Decimal`, `Fraction`).
Other objects stay in the program and are represented by a handle that can be called, whose attributes can be read
and set, and that equals only itself. A test cannot hand the program a function, nor see that it changed an argument
in place. Only the standard library can be imported.
"""

from spd_lens.sandbox.runner import available, passes_tests, run_python, unavailable
from spd_lens.sandbox.trial import SandboxResult

__all__ = ["SandboxResult", "available", "passes_tests", "run_python", "unavailable"]
