"""The tables of docs/models.md: complete, and a tick only where every test of the cell passed."""

import importlib.util
import re
import sys
from pathlib import Path

from spd_lens.models.architectures import ARCHITECTURES
from tests.models.zoo import ZOO

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("model_table", ROOT / "scripts" / "model_table.py")
model_table = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = model_table  # dataclasses look their module up
SPEC.loader.exec_module(model_table)

REPORT = """<testsuites><testsuite>
<testcase><properties><property name="cell" value="llama|bridge|float32|fold"/><property name="kl" value="1e-9"/>
<property name="logits" value="2e-6"/></properties></testcase>
<testcase><properties><property name="cell" value="llama|bridge|float32|fold"/><property name="kl" value="3e-9"/>
</properties>{verdict}</testcase>
<testcase><properties><property name="refused" value="phi|hooked|float32"/></properties></testcase>
</testsuite></testsuites>"""


def results(tmp_path, verdict=""):
    path = tmp_path / "report.xml"
    path.write_text(REPORT.format(verdict=verdict))
    found = model_table.Results()
    found.read("hooked", path)
    return found


def test_a_tick_needs_every_test_of_the_cell(tmp_path):
    assert results(tmp_path).marks("llama", "float32", ["fold"]) == "? ✓ ?"
    for verdict in ("<failure/>", "<error/>", "<skipped/>"):
        assert results(tmp_path, verdict).marks("llama", "float32", ["fold"]) == "? ✗ ?"
    assert results(tmp_path).marks("llama", "float32", ["fold", "capture"]) == "? ? ?"
    assert results(tmp_path).marks("phi", "float32", ["fold"]) == "– ? ?"


def test_the_largest_difference_is_shown(tmp_path):
    assert "| hooks and folded weights: KL | 3e-09 (1e-05) |" in model_table.tolerances(results(tmp_path))


def test_tables_go_between_their_markers():
    document = "a\n<!-- x: written by make model-table -->\nold\n<!-- end of x -->\nb\n"
    new = model_table.written(document, {"x": "| new |"})
    assert new == document.replace("old", "| new |")
    assert model_table.written(new, {"x": "| new |"}) == new


def test_the_document_has_every_architecture_and_no_failure():
    text = model_table.DOCUMENT.read_text()
    table = re.search(r"<!-- matrix: .*?-->\n(.*?)<!-- end of matrix -->", text, re.DOTALL).group(1)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()[2:]}
    assert set(rows) == set(ZOO) | {name for name, layout in ARCHITECTURES.items() if layout.refused}
    assert {name.split(",")[0] for name in rows} == set(ARCHITECTURES)
    assert not re.search("[✗?]", table)
    for name, member in ZOO.items():
        assert ("– " in rows[name]) == (not member.hooked or len(member.hooked_dtypes) < 3), name
