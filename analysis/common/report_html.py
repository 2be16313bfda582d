"""A report in Markdown as part of a page."""

from __future__ import annotations

from markdown_it import MarkdownIt

from spd_lens.output import visible


def html_of(markdown: str) -> str:
    """HTML of a report's Markdown. HTML in it is text, and there are no links and no images."""
    # bars are escaped in cells of tables alone
    lines = [line if line.startswith("|") else line.replace("\\|", "|") for line in markdown.split("\n")]
    rules = ["link", "image", "autolink", "reference", "html_block", "html_inline"]
    html: str = MarkdownIt("commonmark", {"html": False}).enable("table").disable(rules).render("\n".join(lines))
    return visible(html).replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
