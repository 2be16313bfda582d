"""The site made of these pages: `make docs` builds it into `build/docs`, without a network."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.fileutil import copy_asset
from sphinx.writers.html5 import HTML5Translator

import spd_lens

project = "spd_lens"
author = "the authors of spd_lens"
release = version = importlib.metadata.version("spd-lens")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
    "sphinx_llms_txt",
]
templates_path = ["_templates"]
exclude_patterns = ["_templates", "notebooks"]

# A missing page, heading, term or label is an error. Types are not: Tensor and the like are described elsewhere.
nitpicky = True
suppress_warnings = ["ref.python"]  # short names in annotations, which two packages may both have
nitpick_ignore_regex = [("py:.*", "(?s:.*)")]

# Anchors of headings as code hosts make them, so that one link serves both.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]

default_role = "code"  # what docstrings mean by `name`
autodoc_typehints_format = "fully-qualified"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autosummary_ignore_module_all = False
autosummary_context = {"first": spd_lens.__all__}
maximum_signature_line_length = 100
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"spd_lens {release}"
html_math_renderer = "mathml"
html_show_copyright = False

llms_txt_uri_template = "_sources/{docname}{suffix}{sourcelink_suffix}"  # pages as Markdown
llms_txt_exclude = ["api/*"]


def _mathml(writer: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Equations as MathML, which browsers draw by themselves: MathJax would come from elsewhere at every visit."""
    block = isinstance(node, nodes.math_block)
    writer.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def _copy_notebooks(app: Sphinx) -> None:
    """The pages of the executed notebooks, as they are; their links among each other then lead where they should."""
    copy_asset(Path(app.srcdir) / "notebooks", Path(app.outdir) / "notebooks")


def _as_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sections in Google's style and fenced code, as reStructuredText.

    The extension napoleon would read a field's docstring as `type: description`, and here those are sentences.
    """
    text = "\n".join(lines) if what in ("attribute", "data", "property") else str(GoogleDocstring(lines, what=what))
    fenced = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
    lines[:] = fenced.sub(_code_block, text + "\n").splitlines()


def _code_block(found: re.Match[str]) -> str:
    indent, language, code = found.groups()
    return f"{indent}.. code-block:: {language}\n\n" + re.sub(r"(?m)^(?=.)", "   ", code)


def setup(app: Sphinx) -> None:
    """What the pages need beside the extensions."""
    app.add_html_math_renderer("mathml", (_mathml, None), (_mathml, None))
    app.add_lexer("floors", TextLexer)  # the block of docs/architecture.md that a test reads
    app.connect("autodoc-process-docstring", _as_rst)
    app.connect("builder-inited", _copy_notebooks)
