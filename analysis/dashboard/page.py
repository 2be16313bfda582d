"""The page: template, data, script and plotly in one file that asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any, Literal

from plotly.offline import get_plotlyjs

Look = Literal["page", "embedded", "framed"]
SCRIPTS = ("core.js", "figures.js", "texts.js")


def page(document: Mapping[str, Any], *, title: str, look: Look = "page") -> str:
    """A self-contained HTML page of a document that `data.assemble` made.

    Its policy forbids requests altogether, and runs no script but the page's own, known by their hashes: text from a
    model or a data set stays text even where escaping it should fail. `look`: `"embedded"` has no margins, for a
    notebook's output; `"framed"` has no header either, for a frame in a page that has one.
    """
    script = "\n".join(template(name).replace('"use strict";\n', "") for name in SCRIPTS)
    script = f'"use strict";\n{script}'
    allowed = " ".join(f"'sha256-{digest(part)}'" for part in (plotly_script(), script))
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )
    slots = {
        "POLICY": policy,
        "TITLE": escape(title),
        "STYLE": template("page.css"),
        "DATA": as_json(document),
        "PLOTLY": plotly_script(),
        "SCRIPT": script,
    }
    shell = template("page.html")
    shell = shell.replace("<body>", f'<body class="{look}">', 1)
    # in one pass: what fills one slot may itself look like another
    return re.sub(r"@([A-Z]+)@", lambda slot: slots[slot.group(1)], shell)


def as_json(value: Any) -> str:
    """JSON for a script element: no `<` in it, so that no text can end the element, and no NaN."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def template(name: str) -> str:
    """A file beside this one."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")


@cache
def plotly_script() -> str:
    """plotly.js as it goes into the page; a browser hashes it with plain line feeds."""
    return get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")


def digest(script: str) -> str:
    """A script's hash, as a content security policy names it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
