"""The live app: the page, and an endpoint that generates. It answers this machine alone, and who knows its address.

Whoever made a run directory also made the pages in it, and they may be hostile. They are shown in a frame without an
origin, which loads nothing, reads nothing and leads nowhere.
"""

from __future__ import annotations

import logging
import re
import secrets
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import flask
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.serving import BaseWSGIServer, make_server

from spd_lens.analysis.common import PACKAGE, Subject, subjects
from spd_lens.analysis.dashboard.document import assemble
from spd_lens.analysis.dashboard.page import page
from spd_lens.analysis.dashboard.playground import MAX_NEW_TOKENS, MAX_PROMPT, NAMES, Ask, Playground
from spd_lens.errors import SPDError, shortened
from spd_lens.files import Manifest, file_sha256
from spd_lens.output import Console, render
from spd_lens.subspaces import resolve_rank

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
_OWN_NAMES = ("127.0.0.1", "localhost", "::1")
_SAVED_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
"""Of a saved page: scripts without an origin, which see no other page, and may draw and nothing else."""
_LARGEST = 64 * 2**20
EXAMPLE = "Tom has 12 apples and buys 30 more. He gives half of them away. How many apples does he have now?"


def serve(runs: Sequence[str | Path], *, port: int = 8050) -> None:
    """Run the app until it is interrupted."""
    found = subjects(runs)
    with listen(port) as waiting:
        token = secrets.token_urlsafe(16)
        server = start(create_app(found, token), waiting)
        address = f"http://{HOST}:{server.port}/{token}/"
        Console(stderr=True).print(f"{address}  (Ctrl-C stops it)", highlight=False, markup=False, soft_wrap=True)
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
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # no line per request, however broken it is
    return make_server(HOST, waiting.getsockname()[1], app, threaded=True, fd=waiting.fileno())


def create_app(found: Sequence[Subject], token: str, lock: threading.Lock | None = None) -> flask.Flask:
    """The app of some runs, whose model is loaded.

    Args:
        found: The runs.
        token: The first part of every address. Another program of this machine, or a page elsewhere, does not know it.
        lock: Held while a question is answered.
    """
    lock = lock or threading.Lock()
    playgrounds = {subject.name: Playground(subject, lock) for subject in found}
    document = assemble(found, link=lambda subject, path: f"analysis/{subject.name}/{path.name}")
    html = page(document, title=f"SPD dashboard: {', '.join(playgrounds)}", playground=offered(playgrounds))
    by_name = {subject.name: subject for subject in found}
    app = flask.Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = 1_000_000
    _protect(app, token)

    @app.get(f"/{token}/")
    def show_page() -> flask.Response:
        return _page(html)

    @app.get(f"/{token}/analysis/<run>/<name>")
    def show_framed(run: str, name: str) -> flask.Response:
        _saved(by_name.get(run), name)
        place = "/".join(quote(part, safe="") for part in (run, name))
        return _page(render("framed.html", package=PACKAGE, title=name, source=f"../../frames/{place}"))

    @app.get(f"/{token}/frames/<run>/<name>")
    def show_saved(run: str, name: str) -> flask.Response:
        if flask.request.headers.get("Sec-Fetch-Dest", "iframe") != "iframe":
            raise SPDError("a saved page is shown in a frame alone; follow its link on the app's page")
        response = flask.Response(_saved(by_name.get(run), name), mimetype="text/html")
        response.headers["Content-Security-Policy"] = _SAVED_POLICY
        return response

    @app.post(f"/{token}/generate")
    def generate() -> flask.Response:
        try:
            return flask.jsonify(answer(playgrounds, _question()))
        except SPDError as error:
            response = flask.jsonify(error=str(error))
            response.status_code = 400
        except HTTPException:
            raise
        except Exception:
            log.exception("the generation failed")
            response = flask.jsonify(error="the generation failed; the terminal that runs this app says why")
            response.status_code = 500
        return response

    return app


def _page(html: str) -> flask.Response:
    """A page of the app's own, whose policy is also sent ahead of it; nothing may frame it."""
    response = flask.Response(html, mimetype="text/html")
    written = re.search('http-equiv="Content-Security-Policy" content="(.*?)"', html)
    response.headers["Content-Security-Policy"] = f"{written[1] if written else ''}; frame-ancestors 'none'"
    return response


def _saved(subject: Subject | None, name: str) -> str:
    """A page in a run's `analysis/` folder; `SPDError` unless it is a file there, as the run's manifest has it.

    A link may lead to any file of this machine. A page that the run's own versions did not write may say anything.
    """
    if subject is None or (path := subject.folder / name).suffix != ".html" or not path.is_file():
        raise SPDError("there is no such page")
    if path.resolve() != subject.run.path.resolve() / "analysis" / name:
        raise SPDError(f"{name} leads out of its folder and is not shown")
    if path.stat().st_size > _LARGEST:
        raise SPDError(f"{name} has more than {_LARGEST} bytes and is not shown; open the file itself")
    recorded = _recorded(subject.run.path)
    if recorded and recorded.get(f"analysis/{name}") != file_sha256(path):
        raise SPDError(f"{name} is not as spd_lens wrote it, by manifest.json, and is not shown")
    return path.read_text(encoding="utf-8", errors="replace")


def _recorded(run: Path) -> dict[str, str]:
    """The sha256 of each file of the analyses that a run's manifest lists; empty where it lists none."""
    manifest = Manifest.of(run)
    return {} if manifest is None else {
        name: entry.sha256 for name, entry in manifest.files.items() if name.startswith("analysis/")
    }  # fmt: skip


def _question() -> Any:
    """What was sent as JSON; `SPDError` if it is none."""
    try:
        return flask.request.get_json()
    except RequestEntityTooLarge:
        raise
    except (HTTPException, RecursionError) as error:
        raise SPDError("a question is sent as JSON, and this is none") from error


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
        raise SPDError(f"there is no run {shortened(repr(run))}; choose from {', '.join(playgrounds)}")
    layers, kinds, also = (asked.get(name) or [] for name in ("layers", "kinds", "also"))
    for name, listed in (("layers", layers), ("kinds", kinds), ("also", also)):
        if not isinstance(listed, list) or not all(isinstance(part, str | int) for part in listed):
            raise SPDError(f"{name} is {shortened(repr(listed))}; send a list of names or numbers")
    ask = Ask(
        asked.get("prompt", ""), layers, kinds, asked.get("rank"), asked.get("form") == "head", asked.get("strength"),
        asked.get("tokens"), asked.get("temperature"), asked.get("seed"), also,
    )  # fmt: skip
    found = playgrounds[run].answer(ask)
    facts = f"ranks {found.ranks} · strength {ask.strength:g} · seed {ask.seed} · temperature {ask.temperature:g}"
    return asdict(found) | {"facts": facts}


def _protect(app: flask.Flask, token: str) -> None:
    """Answer no pages but those of this machine that know the token, and every mistake in a sentence.

    A page elsewhere can make a browser ask 127.0.0.1, under its own name (DNS rebinding) or across sites: both show
    in the request's headers and are refused. The app's pages say what they load in policies of their own; anything else
    loads nothing and is framed nowhere.
    """

    @app.before_request
    def own_requests_only() -> flask.Response | None:
        if _host(f"//{flask.request.host}") not in _OWN_NAMES:
            return _refuse(f"this app answers at {HOST} alone, not as {shortened(flask.request.host)}", 403)
        origin = flask.request.headers.get("Origin")
        if origin is not None and origin != f"http://{flask.request.host}":
            return _refuse("this app answers its own pages alone", 403)
        given = flask.request.path.lstrip("/").partition("/")[0]
        if not secrets.compare_digest(given.encode(errors="replace"), token.encode()):
            return _refuse("this app answers at the address that its terminal shows, which nobody can guess", 403)
        return None

    @app.after_request
    def own_content_only(response: flask.Response) -> flask.Response:
        headers = response.headers
        headers.setdefault("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
        headers["X-Content-Type-Options"] = "nosniff"
        headers["X-DNS-Prefetch-Control"] = "off"
        headers["Referrer-Policy"] = "no-referrer"
        headers["Cross-Origin-Resource-Policy"] = headers["Cross-Origin-Opener-Policy"] = "same-origin"
        headers["Cache-Control"] = "no-store"
        return response

    @app.errorhandler(SPDError)
    def mistake(error: SPDError) -> flask.Response:
        return _refuse(str(error), 404)

    @app.errorhandler(HTTPException)
    def no_such_request(error: HTTPException) -> flask.Response:
        return _refuse(f"this app does not answer that ({error.name})", error.code or 400)


def _host(address: str) -> str | None:
    """The host in an address; None if there is none that can be read."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _refuse(why: str, status: int) -> flask.Response:
    return flask.Response(escape(why) + "\n", status=status, mimetype="text/plain")
