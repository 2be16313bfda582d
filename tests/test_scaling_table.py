"""The tables of docs/scaling.md: what plans and the committed measurements say today."""

import pytest

from benchmarks import scaling_table
from benchmarks.scaling import Took, row


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_the_page_has_what_plans_and_measurements_say():
    page = scaling_table.DOCUMENT.read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->\n|" in page and f"<!-- end of {name} -->" in page for name in scaling_table.TABLES)
    assert scaling_table.written(page) == page


def test_a_table_that_is_out_of_date_is_written_anew(monkeypatch):
    monkeypatch.setattr(scaling_table, "TABLES", {"costs": lambda: ["| new |"]})
    page = "before\n<!-- costs -->\n| old |\n| old |\n<!-- end of costs -->\nafter"
    assert scaling_table.written(page) == page.replace("| old |\n| old |", "| new |")


def test_an_error_is_what_was_measured_over_what_the_calibration_foresaw():
    """2 s at the assumed rate, of which the calibration took 1.5 times as long: 3 s foreseen, and 3.6 s measured."""
    found = row("m", "extract", 8, [Took(9.0, 3.6, 2.0)], 1.5)
    assert found.value == pytest.approx(1.2)
    assert (found.peer, found.ours) == ("3.0 s", "3.6 s") and "9.0 s by the clock" in found.note
    both = row("m", "generate", 8, [Took(1.0, 1.0, 2.0), Took(5.0, 4.0, 2.0)], 1.0)
    assert both.value == pytest.approx(2.0), "two processes are done with the later one"
    assert "2 processes" in both.what
