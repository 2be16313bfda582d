"""Whether a built site holds together: every link within it leads to a page and a place that are there.

    python scripts/check_site.py build/docs

Sphinx checks the links that it makes. This checks what a reader gets, raw HTML and the pages of notebooks included, and
that pages load no script, font or image from elsewhere. Exit code 1 if something is wrong.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The anchors of a page, where its links lead, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name == "href" and value and tag == "a":
                self.links.add(value)
            elif name in ("src", "href") and value and tag in ("img", "link", "script", "source", "iframe"):
                self.loaded.add(value)


def faults(site: Path) -> list[str]:
    """One line for each lost link and each thing that is loaded from elsewhere."""
    pages = {path.resolve(): _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    if not pages:
        return [f"{site} holds no page"]
    found = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        for link in sorted(page.links | page.loaded):
            parts = urlsplit(link)
            if parts.scheme == "data":
                continue
            if parts.scheme or parts.netloc:
                found += [f"{name} loads {link} from elsewhere"] if link in page.loaded else []
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists() or not target.is_relative_to(site.resolve()):
                found.append(f"{name} leads to {link}, which is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{name} leads to {link}, and that page has no such place")
    return found


if __name__ == "__main__":
    lost = faults(Path(sys.argv[1]))
    if lost:
        sys.exit("\n".join(lost))
    print(f"every link within {sys.argv[1]} leads to its place")
