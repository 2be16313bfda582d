"""A small server that stands where the Hugging Face hub stands: repositories in memory, over the hub's own protocol."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What is in the server: every repository's commits, each the content of its files by name."""

    def __init__(self, token: str = "hf_test") -> None:
        self.token = token
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.url = ""

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a revision, and its files; None where there is none."""
        for files in reversed(self.repositories.get(repo, [])):
            if revision in ("main", commit_of(files)):
                return commit_of(files), files
        return None


def commit_of(files: dict[str, bytes]) -> str:
    """A commit's name, by its content."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._json({"error": "Invalid credentials"}, 401)
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = "/".join(filter(None, [asked.get("organization", "me"), asked["name"]]))
            if name in self.hub.repositories:
                return self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
            self.hub.repositories[name] = [{}]
            return self._json({"url": f"{self.hub.url}/{name}"})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/(.+)", path)
        if not found or found[1] not in self.hub.repositories:
            return self._answer(404, X_Error_Code="RepoNotFound")
        if found[2] == "preupload":
            files = json.loads(content)["files"]
            return self._json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        files = dict(self.hub.repositories[found[1]][-1])
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.hub.repositories[found[1]].append(files)
        commit = commit_of(files)
        return self._json({"commitUrl": f"{self.hub.url}/{found[1]}/commit/{commit}", "commitOid": commit})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            there = self.hub.at(found[1], found[3] or "main")
            if found[1] not in self.hub.repositories:
                return self._answer(404, X_Error_Code="RepoNotFound")
            if there is None:
                return self._answer(404, X_Error_Code="RevisionNotFound")
            if found[2] == "tree":
                listed = [{"type": "file", "path": name, "size": len(body)} for name, body in there[1].items()]
                return self._json([{**file, "oid": there[0]} for file in listed])
            return self._json({"id": found[1], "sha": there[0], "siblings": [{"rfilename": name} for name in there[1]]})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            there = self.hub.at(found[1], found[2])
            if there is None or found[3] not in there[1]:
                return self._answer(404, X_Error_Code="EntryNotFound")
            body = there[1][found[3]]
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            return self._answer(200, body, ETag=etag, X_Repo_Commit=there[0])
        return self._answer(404)

    do_HEAD = do_GET


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """A hub that answers on this machine while the context is open."""
    there = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": there}))
    there.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield there
    finally:
        server.shutdown()
        server.server_close()
