"""What crosses between program and judge."""

import json
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spd_lens.sandbox import inside

NUMBERS = st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
TEXTS = st.text() | st.binary() | st.binary().map(bytearray)
VALUES = st.dates() | st.datetimes() | st.timedeltas() | st.decimals(allow_nan=False) | st.fractions()
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS | VALUES | st.sampled_from([int, dict, range(2, 9, 3)])
KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.text())
DATA = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(KEYS, inner)
        | st.frozensets(KEYS)
        | st.sets(KEYS)
        | st.lists(inner).map(deque)
    ),
)


@given(DATA)
def test_data_cross_unchanged(value):
    there = json.loads(json.dumps(inside.encode(value, lambda _: 0)))
    back = inside.decode(there, lambda number: number)
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize("answer", [{}, ["int", 3], ["list", 3], ["value", "os", "system", ["true"]], ["pickle", "x"],
                                    ["type", "print"], ["object", "0"], ["dict", [[["list", []], 1]]], []])  # fmt: skip
def test_answers_of_no_known_form_are_refused(answer):
    with pytest.raises((ValueError, TypeError)):
        inside.decode(answer, lambda number: number)
