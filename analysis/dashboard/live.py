"""The live app: the page's views, and a studio that generates. For this machine alone."""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import dash
import flask
from rich.console import Console
from werkzeug.serving import BaseWSGIServer, make_server

from spd_lens.errors import SPDError

from ..inputs import Subject, subjects
from .data import assemble
from .page import digest, page, template
from .studio import Studio
from .studio_view import add_callbacks, layout

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
_OWN_NAMES = ("127.0.0.1", "localhost", "::1")

_SHELL = """<!DOCTYPE html>
<html lang="en"><head>{%metas%}<title>{%title%}</title>{%favicon%}{%css%}<style>@STYLE@</style>
<script>@SCRIPT@</script></head>
<body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body></html>
"""


def serve(runs: Sequence[str | Path], *, port: int = 8050) -> None:
    """Run the app until it is interrupted."""
    found = subjects(runs)
    with listen(port) as waiting:
        server = start(create_app(found), waiting)
        Console(stderr=True).print(f"http://{HOST}:{server.port}  (Ctrl-C stops it)", highlight=False)
        server.serve_forever()


def listen(port: int) -> socket.socket:
    """A socket on this machine's own address; `SPDError` where the port is taken."""
    waiting = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    waiting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        waiting.bind((HOST, port))
    except OSError as error:
        waiting.close()
        raise SPDError(f"port {port} cannot be used ({error.strerror}); choose another with --port") from error
    waiting.listen()
    return waiting


def start(app: dash.Dash, waiting: socket.socket) -> BaseWSGIServer:
    """A server on a socket, ready to `serve_forever`. Threads: a page still loads while the model generates."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line per request
    return make_server(HOST, waiting.getsockname()[1], app.server, threaded=True, fd=waiting.fileno())


def create_app(found: Sequence[Subject], lock: threading.Lock | None = None) -> dash.Dash:
    """The Dash app of some runs; loads their model. `lock` is held while a question is answered."""
    lock = lock or threading.Lock()
    studios = {subject.name: Studio(subject, lock) for subject in found}
    document = assemble(found, link=lambda subject, path: f"analysis/{subject.name}/{path.name}")
    views = page(document, title="Views", look="framed")

    server = flask.Flask(__name__, static_folder=None)
    server.config["MAX_CONTENT_LENGTH"] = 1_000_000
    app = dash.Dash(
        "spd_lens_dashboard", server=cast(Any, server), title="SPD dashboard", update_title="", serve_locally=True,
        index_string=_shell(),
        assets_folder="", include_assets_files=False, add_log_handler=False,
    )  # fmt: skip
    app.layout = layout(studios)
    add_callbacks(app, studios)
    protect(server, app)

    @server.get("/views")
    def show_views() -> flask.Response:
        return flask.Response(views, mimetype="text/html")

    pages = {(s.name, path.name): path for s in found for path in s.folder.glob("*.html")}

    @server.get("/analysis/<run>/<name>")
    def show_saved(run: str, name: str) -> flask.Response:
        if (run, name) not in pages:  # a list of what there is: no path is put together from a request
            flask.abort(404)
        return flask.Response(pages[run, name].read_text(encoding="utf-8"), mimetype="text/html")

    return app


def _shell() -> str:
    slots = {"STYLE": template("page.css") + template("studio.css"), "SCRIPT": template("studio.js")}
    return re.sub(r"@([A-Z]+)@", lambda slot: slots[slot.group(1)], _SHELL)


def protect(server: flask.Flask, app: dash.Dash) -> None:
    """Answer this machine's own pages alone.

    A page elsewhere can make a browser ask 127.0.0.1, under its own name (DNS rebinding) or across sites: both show
    in the request's headers and are refused. Answers may be framed by the app alone and load nothing from elsewhere.
    """
    allowed = " ".join([*app.csp_hashes(), f"'sha256-{digest(template('studio.js'))}'"])
    policy = (
        f"default-src 'self'; script-src 'self' {allowed}; style-src 'self' 'unsafe-inline'; img-src 'self' data: "
        "blob:; font-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'self'"
    )

    @server.before_request
    def own_requests_only() -> flask.Response | None:
        if urlsplit(f"//{flask.request.host}").hostname not in _OWN_NAMES:
            return _refuse(f"this app answers at {HOST} alone, not as {flask.request.host}")
        origin = flask.request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != flask.request.host:
            return _refuse("this app answers its own pages alone")
        return None

    @server.after_request
    def own_content_only(response: flask.Response) -> flask.Response:
        own_policy = flask.request.endpoint in ("show_views", "show_saved")  # those say themselves what they load
        response.headers["Content-Security-Policy"] = "frame-ancestors 'self'" if own_policy else policy
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        return response


def _refuse(why: str) -> flask.Response:
    return flask.Response(escape(why) + "\n", status=403, mimetype="text/plain")
