"""Pages as Jinja2 templates over one base: everything from models or data is escaped, and nothing is fetched.

`templates/base.html` holds the head, the light and dark colours, the policy and the scripts; each page extends it. A
page works from `file://`, without a network.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from spd_lens.output.safe_text import all_visible, visible


def render(name: str, *, package: str = "spd_lens", scripts: Sequence[str] = (), **context: Any) -> str:
    """The page of a template.

    Its policy runs no script but `scripts`, known by their hashes: text from a model or a data set stays text even
    where escaping it should fail.

    Args:
        name: File name of the template, in `templates/` of the package; templates of the library are at hand too.
        package: Package that holds the template.
        scripts: JavaScript sources, which go to the end of the page in this order.
        context: Values of the template. `title`, `facts` (short texts) and `says` (a paragraph) are shown on top.
    """
    hashes = " ".join(f"'sha256-{digest(script)}'" for script in scripts)
    context.setdefault("facts", ())
    context.setdefault("says", "")
    policy = f"script-src {hashes}; img-src data: blob:; " if scripts else ""
    return _environment(package).get_template(name).render(scripts=scripts, script_policy=policy, **context)


@cache
def source(name: str, package: str) -> str:
    """The text of a file in `templates/` of a package, with plain line feeds, with which a browser hashes it."""
    return files(package).joinpath("templates", name).read_text(encoding="utf-8").replace("\r\n", "\n")


def digest(script: str) -> str:
    """A script's hash, as a content security policy names it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _environment(package: str) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in dict.fromkeys((package, "spd_lens"))]),
        autoescape=True, finalize=_shown, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    # no NaN, which is no JSON; keys in the order in which they are given; every text made visible, as in `_shown`
    environment.policies["json.dumps_function"] = lambda value, **options: json.dumps(all_visible(value), **options)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "ensure_ascii": False, "separators": (",", ":")}
    return environment


def _shown(value: object) -> object:
    """Every value of a template that is no HTML, made visible before it is escaped."""
    return value if hasattr(value, "__html__") else visible(str(value))
