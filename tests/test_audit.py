"""`make audit` says what was not looked up; pip-audit alone calls that no known vulnerabilities."""

import importlib.util
import json
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("audit", Path(__file__).parents[1] / "scripts" / "audit.py")
audit = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(audit)

SKIPPED = {"name": "a", "skip_reason": "Dependency not found on PyPI and could not be audited: a (1.0)"}
SOUND = {"name": "b", "version": "2.0", "vulns": []}
HOLE = {"name": "c", "version": "3.0", "vulns": [{"id": "CVE-1-2", "fix_versions": ["3.1"], "aliases": []}]}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([SOUND, SOUND], 0, "pins: 0 known holes in 2 packages"),
        ([SOUND, SKIPPED], 0, "pins: 0 known holes in 2 packages (1 are not known to the index)"),
        ([SKIPPED, SKIPPED], 0, "pins: not audited, since the package index that pip uses here knows no advisories"),
        ([SOUND, HOLE], 1, "pins: 1 known holes in 2 packages\n  c 3.0: CVE-1-2, mended in 3.1"),
    ],
)
def test_what_is_found_and_what_was_not_looked_up(packages, code, said):
    assert audit.report("pins", json.dumps({"dependencies": packages, "fixes": []})) == (code, said)


def test_without_a_network():
    assert audit.report("pins", "") == (0, "pins: not audited, since the package index cannot be reached")
