"""The live app: the page, and an endpoint that generates. It answers this machine alone."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import flask
from rich.console import Console
from werkzeug.serving import BaseWSGIServer, make_server

from spd_lens.analysis.common import Subject, subjects
from spd_lens.analysis.dashboard.document import assemble
from spd_lens.analysis.dashboard.page import page
from spd_lens.analysis.dashboard.playground import MAX_NEW_TOKENS, MAX_PROMPT, NAMES, Ask, Playground
from spd_lens.errors import SPDError
from spd_lens.subspaces import resolve_rank

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
_OWN_NAMES = ("127.0.0.1", "localhost", "::1")
EXAMPLE = "Tom has 12 apples and buys 30 more. He gives half of them away. How many apples does he have now?"


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


def start(app: flask.Flask, waiting: socket.socket) -> BaseWSGIServer:
    """A server on a socket, ready to `serve_forever`. Threads: a page still loads while the model generates."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # no line per request
    return make_server(HOST, waiting.getsockname()[1], app, threaded=True, fd=waiting.fileno())


def create_app(found: Sequence[Subject], lock: threading.Lock | None = None) -> flask.Flask:
    """The app of some runs, whose model is loaded. `lock` is held while a question is answered."""
    lock = lock or threading.Lock()
    playgrounds = {subject.name: Playground(subject, lock) for subject in found}
    document = assemble(found, link=lambda subject, path: f"analysis/{subject.name}/{path.name}")
    html = page(document, title=f"SPD dashboard: {', '.join(playgrounds)}", playground=offered(playgrounds))
    saved = {(s.name, path.name): path for s in found for path in s.folder.glob("*.html")}
    app = flask.Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = 1_000_000
    _protect(app)

    @app.get("/")
    def show_page() -> flask.Response:
        return flask.Response(html, mimetype="text/html")

    @app.get("/analysis/<run>/<name>")
    def show_saved(run: str, name: str) -> flask.Response:
        if (run, name) not in saved:  # no path is put together from a request
            flask.abort(404)
        return flask.Response(saved[run, name].read_text(encoding="utf-8"), mimetype="text/html")

    @app.post("/generate")
    def generate() -> flask.Response:
        try:
            return flask.jsonify(answer(playgrounds, flask.request.get_json(silent=True)))
        except SPDError as error:
            return flask.jsonify(error=str(error))
        except Exception:
            log.exception("the generation failed")
            return flask.jsonify(error="the generation failed; the terminal that runs this app says why")

    return app


def offered(playgrounds: Mapping[str, Playground]) -> dict[str, Any]:
    """What the form offers, and the first run's own settings, with which it begins."""
    first = next(iter(playgrounds.values()))
    config, used = first.subject.run.config, first.subject.subspace
    form = "head" if config.per_head else "joint"
    also = [("random", "random subspace of the same ranks"), ("spd", "the model after SPD")]
    return {
        "example": EXAMPLE, "max_prompt": MAX_PROMPT, "max_tokens": MAX_NEW_TOKENS, "max_seed": 2**32 - 1,
        "names": NAMES, "runs": [(name, name) for name in playgrounds], "layers": [(n, n) for n in first.layers],
        "used_layers": {site.layer for site in used.sites}, "kinds": [(kind, kind.upper()) for kind in first.kinds],
        "used_kinds": {site.kind for site in used.sites}, "form": form,
        "widths": {name: min(playground.width(per_head) for playground in playgrounds.values())
                   for name, per_head in (("head", True), ("joint", False))},
        "rank": resolve_rank(first.subject.rank(""), first.width(config.per_head)), "strength": config.strength,
        "tokens": min(96, config.max_new_tokens), "seed": config.seed,
        "also": also if any(playground.adapter for playground in playgrounds.values()) else also[:1],
    }  # fmt: skip


def answer(playgrounds: Mapping[str, Playground], asked: Any) -> dict[str, Any]:
    """The answer to a browser's question, as data; `SPDError` if it asks for what does not exist.

    Nothing in the question is trusted: what is no number or no text stays as it is, for the playground to refuse.
    """
    asked = asked if isinstance(asked, dict) else {}
    if (run := asked.get("run")) not in list(playgrounds):
        raise SPDError(f"there is no run {run!r}; choose from {', '.join(playgrounds)}")
    ask = Ask(
        asked.get("prompt", ""), asked.get("layers") or [], asked.get("kinds") or [], asked.get("rank"),
        asked.get("form") == "head", asked.get("strength"), asked.get("tokens"), asked.get("temperature"),
        asked.get("seed"), asked.get("also") or [],
    )  # fmt: skip
    found = playgrounds[run].answer(ask)
    facts = f"ranks {found.ranks} · strength {ask.strength:g} · seed {ask.seed} · temperature {ask.temperature:g}"
    return asdict(found) | {"facts": facts}


def _protect(app: flask.Flask) -> None:
    """Answer no pages but those of this machine.

    A page elsewhere can make a browser ask 127.0.0.1, under its own name (DNS rebinding) or across sites: both show
    in the request's headers and are refused. No page but the app's may frame an answer. The app's pages say
    what they load in policies of their own; anything else loads nothing.
    """

    @app.before_request
    def own_requests_only() -> flask.Response | None:
        if urlsplit(f"//{flask.request.host}").hostname not in _OWN_NAMES:
            return _refuse(f"this app answers at {HOST} alone, not as {flask.request.host}")
        origin = flask.request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != flask.request.host:
            return _refuse("this app answers its own pages alone")
        return None

    @app.after_request
    def own_content_only(response: flask.Response) -> flask.Response:
        own_policy = flask.request.endpoint in ("show_page", "show_saved")
        nothing = "" if own_policy else "default-src 'none'; "
        response.headers["Content-Security-Policy"] = f"{nothing}frame-ancestors 'self'"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        return response


def _refuse(why: str) -> flask.Response:
    return flask.Response(escape(why) + "\n", status=403, mimetype="text/plain")
