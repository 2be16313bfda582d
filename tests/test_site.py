"""The site of docs/: what it lists is what there is, and a lost link is found. `make docs` builds all of it."""

import importlib.util
import pkgutil
import re
import runpy
from pathlib import Path

import pytest

import spd_lens

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
faults = runpy.run_path(str(ROOT / "scripts" / "check_site.py"))["faults"]


def test_every_page_is_in_the_index():
    trees = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    entries = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    listed = [re.sub(r".*<(.+)>", r"\1", entry) for entry in entries]
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")} - {"index"}
    assert len(listed) == len(set(listed)) and set(listed) == pages


def test_every_executed_notebook_is_listed():
    links = set(re.findall(r'href="notebooks/(.+?)"', (DOCS / "notebook-pages.md").read_text()))
    assert links == {path.name for path in (DOCS / "notebooks").glob("*.html")}


def test_every_face_of_the_library_is_in_the_reference():
    listed = set(re.findall(r"(?m)^   (spd_lens[\w.]*)$", (DOCS / "api.md").read_text()))
    rooms = {f"spd_lens.{room.name}" for room in pkgutil.iter_modules(spd_lens.__path__)}
    assert rooms - listed == {"spd_lens.__main__", "spd_lens.cli"}, "commands describe themselves"


@pytest.fixture
def site(tmp_path):
    (tmp_path / "b.html").write_text('<h2 id="here">B</h2><img src="data:image/png;base64,AA">')
    return tmp_path


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ('<a href="b.html">', None),
        ('<a href="b.html#here">', None),
        ('<a href="https://arxiv.org/abs/2605.22675">', None),
        ('<a href="c.html">', "a.html leads to c.html, which is not there"),
        ('<a href="b.html#there">', "a.html leads to b.html#there, and that page has no such place"),
        ('<a href="#top">', "a.html leads to #top, and that page has no such place"),
        ('<a href="../b.html">', "a.html leads to ../b.html, which is not there"),
        ('<script src="https://cdn.example/x.js">', "a.html loads https://cdn.example/x.js from elsewhere"),
    ],
)
def test_lost_links_are_found(site, link, fault):
    (site / "a.html").write_text(link)
    assert faults(site) == ([] if fault is None else [fault])


def test_a_site_without_pages_is_a_fault(tmp_path):
    assert len(faults(tmp_path)) == 1


@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="sphinx is not installed (the extra docs)")
def test_docstrings_become_restructured_text():
    as_rst = runpy.run_path(str(DOCS / "conf.py"))["_as_rst"]
    field = ["Version of the file: 1 had no number."]
    as_rst(None, "attribute", "", None, None, field)
    assert field == ["Version of the file: 1 had no number."], "a sentence with a colon names no type"
    function = ["Do it.", "", "```python", "a = 1", "", "b = 2", "```", "", "Args:", "    x: The `x`."]
    as_rst(None, "function", "", None, None, function)
    text = "\n".join(function)
    assert ".. code-block:: python\n\n   a = 1\n\n   b = 2" in text and ":param x: The `x`." in text
    assert "```" not in text
