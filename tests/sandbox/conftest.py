"""Every mechanism, where it works."""

import pytest

from spd_lens import sandbox
from spd_lens.sandbox import mechanisms, run_python


@pytest.fixture(params=mechanisms.NAMES)
def shut_in(request):
    """`run_python` under one mechanism."""
    problem = sandbox.unavailable().get(request.param)
    if problem:
        pytest.skip(f"{request.param} does not work here: {problem}")

    def run(program, tests=(), **options):
        return run_python(program, tests, mechanism=request.param, **options)

    return run
