"""What a code host reads: the workflow, the forms for issues, and how to cite."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")


def test_the_workflow_runs_what_make_has():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text())
    assert list(workflow["jobs"]) == ["tests", "docs", "wheel", "audit"]
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?m)^([a-z-]+):", makefile))
    named = [command.split()[1] for command in commands if command.startswith("make ")]
    assert named == ["test", "docs", "audit"] and set(named) <= targets
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["lane"] == ["hooked", "bridge"]
    variables = {name for command in commands for name in re.findall(r"\b([A-Z_]+)=", command)}
    assert variables == {"LANES", "TORCH"} and all(f"\n{name} ?=" in makefile for name in variables)
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_asks_for_something(path):
    form = yaml.safe_load(path.read_text())
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert form["name"] and form["description"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert fields[0]["validations"]["required"], "an empty form says nothing"


def test_there_is_a_form_for_each_kind_of_issue():
    assert [path.stem for path in FORMS] == ["bug", "model", "question"]


def test_what_is_cited_is_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    assert cited["references"][0]["identifiers"][0]["value"] == "arXiv:2605.22675"
