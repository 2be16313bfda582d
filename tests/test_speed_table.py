"""The tables of docs/speed.md and docs/speed-tables.md: the committed results, a tick only where a goal was met."""

import json
from dataclasses import asdict

import pytest

from benchmarks import speed_table
from benchmarks.table import Row

FACTS = {
    "date": "2026-01-02",
    "gpu": None,
    "machine": "a processor",
    "cores": 2,
    "versions": {"torch": "2", "trl": None},
}


@pytest.mark.parametrize(
    ("value", "target", "at_least", "mark"),
    [
        (3.0, 3.0, True, "✓"),
        (2.9, 3.0, True, "short"),
        (1.3, 1.3, False, "✓"),
        (1.4, 1.3, False, "short"),
        (1, None, True, ""),
    ],
)
def test_a_tick_where_the_goal_is_met(tmp_path, value, target, at_least, mark):
    row = Row("training", "m", "float32", "a peer", value, value, 7.0, target, at_least)
    (tmp_path / "here.json").write_text(json.dumps({**FACTS, "rows": [{**asdict(row), "met": row.met}]}))
    page = speed_table.written("before\n<!-- here -->\nold\n<!-- end of here -->\nafter", tmp_path)
    assert page.startswith("before\n<!-- here -->\nMeasured 2026-01-02 on a processor, 2 cores; torch 2.\n")
    assert page.endswith("<!-- end of here -->\nafter") and "old" not in page
    assert [line.split("|")[1].strip() for line in page.splitlines() if "a peer" in line] == [mark]


@pytest.mark.parametrize("document", speed_table.DOCUMENTS, ids=lambda path: path.stem)
def test_the_page_has_the_committed_results(document):
    page = document.read_text(encoding="utf-8")
    assert speed_table.written(page, speed_table.RESULTS) == page


def test_there_are_tables_of_both_runs():
    page = speed_table.DOCUMENTS[1].read_text(encoding="utf-8")
    assert "<!-- end of two-cores -->" in page and "<!-- end of two-cores-again -->" in page


def test_what_the_page_says_in_short_is_the_first_run():
    measured = json.loads((speed_table.RESULTS / "two-cores.json").read_text(encoding="utf-8"))["rows"]
    page = speed_table.DOCUMENTS[0].read_text(encoding="utf-8").partition("## How it is measured")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")][
        2:
    ]
    kinds = [(model, dtype) for model in ("smollm2", "qwen2.5-0.5b-shape") for dtype in ("float32", "bfloat16")]
    assert len(lines) == 4
    for stage, peer, *shown in lines:
        found = {
            (row["model"], row["dtype"]): row["value"]
            for row in measured
            if (row["stage"], row["what"]) == (stage, peer)
        }
        assert shown == [f"{found[kind]:.1f}" for kind in kinds], peer
