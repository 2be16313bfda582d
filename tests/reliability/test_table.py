"""`make reliability`: what was tried stands in the page, and what was lost is counted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("reliability", ROOT / "scripts" / "reliability.py")
reliability = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = reliability  # dataclasses look their module up
SPEC.loader.exec_module(reliability)


def test_rows_stand_in_the_page_and_others_stay():
    row = reliability.Row("killed: `run`")
    for end in ("same", "same", "refused: x", "lost: y", "y"):
        row.count(end)
    page = f"above\n{reliability.BEGIN}\n{reliability.END}\nbelow\n"
    page = reliability.document(page, [reliability.Row("states (of 9): `run`", 3), reliability.Row("pages", 1)])
    page = reliability.document(page, [row, reliability.Row("states: `run`", 9)])
    lines = page.splitlines()
    assert (lines[0], lines[-1], lines[2:4]) == ("above", "below", list(reliability.HEAD))
    assert lines[4:7] == ["| states: `run` | 9 | 9 | 0 | 0 |", "| pages | 1 | 1 | 0 | 0 |", str(row)]
    assert str(row) == "| killed: `run` | 5 | 2 | 1 | 2 |"


def test_tests_that_fail_are_lost(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('no machine')\n"
    )
    monkeypatch.setattr(reliability, "ROOT", tmp_path)
    monkeypatch.setitem(reliability.TESTS, "files", ("files", ("test_x.py",)))
    row = reliability.tested("files")
    assert (row.same, row.refused, len(row.lost)) == (0, 1, 1) and "test_b" in row.lost[0]


def test_every_named_test_file_is_there():
    assert all((ROOT / "tests" / file).exists() for _, files in reliability.TESTS.values() for file in files)


def test_parts_are_taken_evenly():
    plan = reliability.Plan(1, 4, None)
    assert (plan.taken(9), plan.taken(3)) == ([0, 2, 4, 6], [0, 1, 2])
    assert reliability.Plan(1, 0, None).taken(3) == [0, 1, 2]
