"""Tests that a wrong answer passes judge nobody."""

import json
from pathlib import Path

import pytest

from spd_lens.sandbox import inside, passes_tests
from spd_lens.sandbox.names import names_of

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "mbpp"

WEAK = {
    "a loop over what the program gives": ["for got, want in zip(f(3), [0, 1, 2]): assert got == want"],
    "the same in one line": ["assert all(got == want for got, want in zip(f(3), [0, 1, 2]))"],
    "a loop over as many": ["got = f(3)\nfor i in range(len(got)): assert got[i] == i"],
    "a loop over nothing": ["for x in []: assert f(x) == 4"],
    "a kind for all of none": ["assert all(isinstance(item, int) for item in f(3))"],
    "a subset": ["assert set(f(3)) <= {0, 1, 2}"],
    "NaN is not far from anything": ["assert not abs(f(2) - 4) > 1e-6"],
    "nor above": ["assert not (f(2) > 4.1 or f(2) < 3.9)"],
    "only not something": ["assert f(2) != 5"],
    "only not None": ["assert f(2) is not None"],
    "a helper that the data lack": ["assert f(2) == expected(2)"],
    "close to such a helper": ["assert abs(f(2) - expected(2)) < 1e-6"],
    "close by the library": ["assert math.isclose(f(2), expected(2))"],
    "as long as such a helper's": ["assert sorted(f(2)) == sorted(expected(2))"],
    "the program with itself": ["assert f(2) == f(2)"],
    "one handle": ["x = f(2)\nassert x == f(3)"],
    "an answer in itself": ["assert f(2) in [f(2)]"],
    "an assert that is caught": ["try:\n    f(2)\n    assert False\nexcept AssertionError:\n    pass"],
    "weak in two ways": ["assert f(2) != 5", "assert f(2) == expected(2)"],
}
STRONG = {
    "an equality": ["assert f(2) == 4"],
    "a loop over what is wanted": ["for x, want in zip([1, 2], [1, 4]): assert f(x) == want"],
    "arguments in a loop": ["for got, want in zip(map(f, [1, 2]), [1, 4]): assert got == want"],
    "closeness": ["assert abs(f(2) - 4) < 1e-6", "assert math.isclose(f(2), 4)"],
    "a value that is not a number": ["assert math.isnan(f(2))"],
    "nothing as a value": ["assert f(2) == []"],
    "truth": ["assert f(2)"],
    "untruth": ["assert not f(3)"],
    "an error": ["try:\n    f(2)\nexcept ValueError:\n    pass\nelse:\n    assert False"],
    "a round trip": ["assert decode(encode('ab')) == 'ab'"],
    "an object": ["s = Stack()\ns.push(1)\nassert s.pop() == 1"],
    "a handle by what it holds": ["assert f(Node(1)).value == 1"],
    "one strong test of two": ["assert f(2) != 5", "assert f(2) == 4"],
    "a wait for the program": ["while f(2) != 4: pass\nassert True"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    monkeypatch.setattr(inside.Nothing, "steps", inside.Nothing.steps)


def decides(tests, setup=""):
    asked, modules = names_of(tests, setup, None)
    return inside.decides({"tests": tests, "setup": setup, "functions": asked, "modules": modules})


@pytest.mark.parametrize("name", [*WEAK, *STRONG])
def test_weak_tests_are_told_from_those_that_decide(name):
    assert decides(["import math\n" + test for test in (WEAK | STRONG)[name]]) == (name in STRONG)


CHEATS = """
print("it ran")
def f(x): return []
expected = f
"""


@pytest.mark.parametrize("name", list(WEAK)[::4])
def test_no_program_passes_them_and_none_is_run(shut_in, name):
    result = shut_in(CHEATS, ["import math\n" + test for test in WEAK[name]])
    assert (result.reason, result.ok, result.passed, result.stdout) == ("unjudged", False, 0, "")
    assert passes_tests(CHEATS, WEAK[name], "") is None


def test_all_of_mbpp_decides():
    """The full form; that the sanitized one does follows from its solutions, which pass."""
    if not (DATA / "mbpp.jsonl").exists():
        pytest.skip("shared/data/mbpp/mbpp.jsonl is not there")
    rows = [json.loads(line) for line in (DATA / "mbpp.jsonl").read_text().splitlines()]
    weak = []
    for row in rows:
        inside.Nothing.steps = 10_000
        if not decides(row["test_list"], row["test_setup_code"]):
            weak.append(row["task_id"])
    assert (len(rows), weak) == (974, [])
