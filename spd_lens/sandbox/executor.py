"""The executor that lets code tasks score: generated programs against their tests, in the sandbox."""

from __future__ import annotations

from collections.abc import Sequence

from spd_lens.sandbox.runner import run_python


def passes_tests(code: str, tests: Sequence[str], setup: str) -> bool:
    """Whether hostile `code` passes trusted `tests`; what `CodeTask.executor` is set to with --allow-code-execution."""
    return run_python(code, tests, setup=setup).ok
