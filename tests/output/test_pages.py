"""The base of all pages: escaped, made visible, alone, and running its own scripts only."""

from __future__ import annotations

import re

import pytest
from jinja2 import DictLoader, UndefinedError

from spd_lens.output import pages

EVIL = "</script><script>alert('x')</script> & \"q\" \u202e\x1b[0m"


@pytest.fixture
def render(monkeypatch: pytest.MonkeyPatch):
    """`render` of a template that the test gives as text, over the real base."""

    def from_text(body: str, **context: object) -> str:
        environment = pages._environment("spd_lens").overlay()
        base = {name: pages.source(name, "spd_lens") for name in ("base.html", "base.css", "pieces.html")}
        environment.loader = DictLoader({**base, "page.html": '{% extends "base.html" %}' + body})
        monkeypatch.setattr(pages, "_environment", lambda package: environment)
        return pages.render("page.html", **context)

    return from_text


def test_every_value_is_escaped_and_made_visible(render) -> None:
    html = render(
        '{% block content %}<p title="{{ x }}">{{ x }}</p>{{ [x, x] | join(" · ") }}{% endblock %}',
        title=EVIL, facts=[EVIL], says=EVIL, x=EVIL,
    )  # fmt: skip
    assert "<script" not in html and "\u202e" not in html and "\x1b" not in html
    assert html.count("&lt;/script&gt;&lt;script&gt;") == html.count("\\u202e\\u001b") == 8
    assert 'title="&lt;/script' in html and '"q"' not in html


def test_a_page_without_scripts_forbids_them(render) -> None:
    html = render("", title="t")
    policy = re.search('Security-Policy" content="(.*?)"', html)[1]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def test_scripts_are_known_by_their_hashes_and_stand_as_they_are(render) -> None:
    script = "if (1 < 2 && '\u00e9') {{ }}"
    html = render("", title="t", scripts=(script,))
    assert f"script-src 'sha256-{pages.digest(script)}';" in html and f"<script>{script}</script>" in html


def test_data_for_scripts_cannot_end_their_element(render) -> None:
    body = "{% block content %}{{ x | tojson }}{% endblock %}"
    html = render(body, title="t", x={"b": EVIL, "a": "é", EVIL: [(1, EVIL), {"c": EVIL}]})
    assert "<script" not in html and html.index('"b"') < html.index('"a":"é"')
    assert "\u202e" not in html and html.count("\\\\u202e\\\\u001b") == 4
    with pytest.raises(ValueError, match="not JSON compliant"):
        render(body, title="t", x=float("nan"))


def test_a_value_that_a_template_lacks_is_an_error(render) -> None:
    with pytest.raises(UndefinedError, match="missing"):
        render("{% block content %}{{ missing }}{% endblock %}", title="t")
