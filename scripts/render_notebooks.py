"""Execute notebooks and write each as one small HTML page: `python scripts/render_notebooks.py [--out DIR] [FILE...]`.

Figures become SVG images, drawn by headless Chromium: pages need neither a network nor plotly.js, and stay small. The
notebooks themselves are left as they are, without outputs. Needs the extra `dev` and a Chromium on the path.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path
from typing import Any

import nbformat
from markdown_it import MarkdownIt
from nbclient import NotebookClient
from plotly.offline import get_plotlyjs
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).resolve().parent.parent
PLOTLY = "application/vnd.plotly.v1+json"
WIDTH, HEIGHT = 860, 450
LARGEST = 2**20
LARGEST_HTML = 100_000
"""Of one output. What is larger carries a script of its own, which a page without scripts cannot run."""

_DRAW = """
const figures = JSON.parse(document.getElementById("figures").textContent);
(async () => {
  for (const [i, figure] of figures.entries()) {
    const width = figure.layout.width || %d, height = figure.layout.height || %d;
    const div = document.createElement("div");
    const url = await Plotly.toImage(
      {data: figure.data, layout: {...figure.layout, width, height}}, {format: "svg", width, height});
    div.className = "svg"; div.textContent = url; document.body.append(div);
  }
})();
"""

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 58rem; margin: 2rem auto; padding: 0 1rem;
  background: #fff; color: #1f2328; }}
pre {{ overflow-x: auto; padding: .7rem 1rem; border-radius: 6px; font-size: .83rem; line-height: 1.45; }}
.code pre {{ background: #f6f8fa; margin: 1rem 0 .3rem; }}
.out pre {{ background: none; border-left: 3px solid #d0d7de; margin: .3rem 0; white-space: pre-wrap; }}
.out img {{ max-width: 100%; height: auto; }}
table {{ border-collapse: collapse; font-size: .85rem; }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid #d0d7de; text-align: right; }}
.out {{ overflow-x: auto; }} .note {{ color: #656d76; font-size: .85rem; }}
{style}</style></head><body>
{body}
<p class="note">{note}</p>
</body></html>
"""


def execute(path: Path) -> tuple[Any, float]:
    """The notebook with outputs, and the seconds that it took."""
    notebook = nbformat.read(path, as_version=4)
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}}).execute()
    return notebook, time.perf_counter() - start


def find_browser() -> str:
    """Chromium, or an end in one sentence."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("figures are drawn by Chromium, which is not on the path; install it")
    return browser


def draw(figures: list[Any]) -> list[str]:
    """Each figure as the address of an SVG image that holds itself."""
    if not figures:
        return []
    safe = json.dumps(figures).replace("<", "\\u003c")
    page = (
        f'<!DOCTYPE html><html><head><meta charset="utf-8"><script>{get_plotlyjs()}</script></head><body>'
        f'<script type="application/json" id="figures">{safe}</script>'
        f"<script>{_DRAW % (WIDTH, HEIGHT)}</script></body></html>"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.html"
        file.write_text(page, encoding="utf-8")
        command = [
            find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000", "--dump-dom",
            file.as_uri(),
        ]  # fmt: skip
        dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    found = [html.unescape(address) for address in re.findall(r'<div class="svg">(.*?)</div>', dom, flags=re.S)]
    if len(found) != len(figures):
        sys.exit(f"Chromium drew {len(found)} of {len(figures)} figures")
    return [_packed(address) for address in found]


def _packed(address: str) -> str:
    """The same image with only those characters escaped that an attribute needs escaped."""
    kind, _, text = address.partition(",")
    return f"{kind},{urllib.parse.quote(urllib.parse.unquote(text), safe=' /:=;,.()-_!*@+?')}"


def render(notebook: Any, title: str, note: str) -> str:
    """The page of an executed notebook."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    images = iter(draw([output["data"][PLOTLY] for output in outputs if PLOTLY in output.get("data", {})]))
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    formatter = HtmlFormatter(nowrap=True)
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(_on_the_site(markdown.render(cell.source)))
            continue
        parts.append(f'<div class="code"><pre>{highlight(cell.source, PythonLexer(), formatter)}</pre></div>')
        parts += [_shown(output, images) for output in cell.outputs]
    return _PAGE.format(
        title=html.escape(title), style=HtmlFormatter().get_style_defs(".code"), body="\n".join(parts),
        note=html.escape(note),
    )  # fmt: skip


def _on_the_site(page: str) -> str:
    """Links to other notebooks and to pages of docs/, as they lead there from docs/notebooks once the site is built."""
    return re.sub(r'href="\.\./docs/([\w/-]+)\.md', r'href="../\1.html', page.replace(".ipynb", ".html"))


def _shown(output: Any, images: Any) -> str:
    if output.output_type == "stream":
        return "" if output.name == "stderr" else f'<div class="out"><pre>{html.escape(output.text)}</pre></div>'
    data = output.get("data", {})
    if PLOTLY in data:
        title = re.sub(r"<[^>]*>", " ", data[PLOTLY]["layout"].get("title", {}).get("text", "figure"))
        return f'<div class="out"><img alt="{html.escape(title)}" src="{next(images)}"></div>'
    page = data.get("text/html", "")
    if len(page) > LARGEST_HTML or "<script" in page:
        return '<p class="note">(an interactive view, which appears where the notebook is run)</p>'
    if page:
        return f'<div class="out">{page}</div>'
    return f'<div class="out"><pre>{html.escape(data.get("text/plain", ""))}</pre></div>'


def main() -> None:
    """Render the notebooks given, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "notebooks")
    arguments = parser.parse_args()
    find_browser()  # before the notebooks take their minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in arguments.files or sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook, seconds = execute(path)
        note = f"{path.name}, executed in {seconds:.0f} seconds. Figures are images here; in a notebook they are live."
        page = render(notebook, path.stem.replace("_", " "), note)
        if len(page.encode()) > LARGEST:
            sys.exit(f"the page of {path.name} has {len(page.encode()) / 2**20:.1f} MB, more than 1")
        target = arguments.out / f"{path.stem}.html"
        target.write_text(page, encoding="utf-8")
        print(f"{target}: {seconds:.0f} s, {len(page.encode()) / 1024:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
