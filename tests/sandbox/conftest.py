"""Every mechanism, where it works."""

import pytest

from spd_lens import sandbox
from spd_lens.sandbox import mechanisms
from spd_lens.sandbox.runner import run_python


@pytest.fixture(params=mechanisms.NAMES)
def mechanism(request):
    """The name of one mechanism."""
    problem = sandbox.unavailable().get(request.param)
    if problem:
        pytest.skip(f"{request.param} does not work here: {problem}")
    return request.param


@pytest.fixture
def shut_in(mechanism):
    """`run_python` under one mechanism."""

    def run(program, tests=(), **options):
        return run_python(program, tests, mechanism=mechanism, **options)

    return run
