"""A small server of OpenAI's completions protocol on this machine: a real model behind real HTTP, which errs on demand.

It shares no code with the library: tokens come from plain recomputation of the whole sequence.
"""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NEEDS_OPENAI = pytest.mark.skipif(
    importlib.util.find_spec("openai") is None, reason="the package openai (extra servers) is not in this environment"
)

FIELDS = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "generation_config"}
"""What a strict server takes, as `transformers serve` does."""


@dataclass
class Served:
    """Models by the name that they are served under, and how the server behaves."""

    models: dict[str, str]
    """Name to checkpoint."""
    takes_ids: bool = True
    shows_ids: bool = True
    strict: bool = False
    """Refuse fields that are not in `FIELDS`."""
    samples: bool = True
    heeds_top_k: bool = True
    fault: Callable[[int], str | None] = lambda n: None
    """What is wrong with the n-th request for a completion, counted from 0."""
    delay: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.loaded = {
            name: (
                AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32),
                AutoTokenizer.from_pretrained(place),
            )
            for name, place in self.models.items()
        }

    def complete(self, asked: dict[str, Any], ids: list[int]) -> tuple[list[int], str]:
        """New ids, the one that ended them included, and why they end."""
        model, tokenizer = self.loaded[asked["model"]]
        own = json.loads(asked.get("generation_config", "{}"))
        ends = asked.get("stop_token_ids") or own.get("eos_token_id") or [tokenizer.eos_token_id]
        top_k = (asked.get("top_k") or own.get("top_k") or -1) if self.heeds_top_k else -1
        generator = torch.Generator().manual_seed(asked.get("seed", 0))
        new: list[int] = []
        while len(new) < asked["max_tokens"]:
            with self.lock, torch.no_grad():
                logits = model(torch.tensor([ids + new])).logits[0, -1].double()
            if asked["temperature"] == 0 or not self.samples:
                new.append(int(logits.argmax()))
            else:
                weights = (logits / asked["temperature"]).softmax(-1)
                if top_k > 0:
                    weights = weights * (weights >= weights.topk(top_k).values[-1])
                order = weights.sort(descending=True)
                cut = order.values.cumsum(-1) - order.values > asked["top_p"] * weights.sum()
                weights[order.indices[cut]] = 0
                new.append(int(torch.multinomial(weights, 1, generator=generator)))
            if new[-1] in ends:
                return new, "stop"
        return new, "length"

    def answer(self, asked: dict[str, Any], fault: str | None) -> dict[str, Any]:
        """The JSON that answers a request, right or as the fault has it."""
        tokenizer = self.loaded[asked["model"]][1]
        prompt = asked["prompt"]
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if fault == "other prompt":
            ids = ids[1:]
        if fault == "cut":
            asked = {**asked, "max_tokens": 2}
        new, why = self.complete(asked, ids)
        if fault == "foreign token":
            new = [10**6, *new[1:]]
        choice: dict[str, Any] = {
            "index": 0, "finish_reason": "abort" if fault == "abort" else why,
            "text": tokenizer.decode(new[:-1] if why == "stop" else new, skip_special_tokens=True),
        }  # fmt: skip
        if self.shows_ids and asked.get("return_token_ids"):
            choice |= {"token_ids": new, "prompt_token_ids": ids}
        choices = {"no choice": [], "two choices": [choice, choice]}.get(str(fault), [choice])
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(new)}
        return {"id": "x", "object": "text_completion", "model": asked["model"], "choices": choices, "usage": usage}


class _Handler(BaseHTTPRequestHandler):
    served: Served
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(200, {"data": [{"id": name, "owned_by": "tests"} for name in self.served.models]})
        elif self.path == "/version":
            self._send(200, {"version": "1.2"})
        else:
            self._send(404, {"detail": "not found"})

    def do_POST(self) -> None:
        served = self.served
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with served.lock:
            fault = served.fault(len(served.requests))
            served.requests.append(asked)
            served.at_once += 1
            served.most_at_once = max(served.most_at_once, served.at_once)
        try:
            self._answer(asked, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with served.lock:
                served.at_once -= 1

    def _answer(self, asked: dict[str, Any], fault: str | None) -> None:
        served = self.served
        if self.path != "/v1/completions":
            return self._send(404, {"detail": "not found"})
        if asked["model"] not in served.models:
            return self._send(404, {"error": {"message": f"no model {asked['model']}"}})
        if not served.takes_ids and not isinstance(asked["prompt"], str):
            return self._send(400, {"detail": "prompt must be a string"})
        if served.strict and (unknown := asked.keys() - FIELDS):
            return self._send(422, {"detail": f"unexpected {sorted(unknown)}"})
        if fault in ("429", "500"):
            return self._send(int(fault), {"detail": "not now"}, {"Retry-After": "0.01"})
        time.sleep(3.0 if fault == "slow" else served.delay)
        body = json.dumps(served.answer(asked, fault)).encode()
        if fault == "half":
            body = body[: len(body) // 2]
        return self._send(200, body, {"Content-Length": str(len(body) + 10)} if fault == "closed" else {})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if headers and "Content-Length" in headers:
            self.close_connection = True  # before all of it was sent


@contextmanager
def serving(models: dict[str, str], **behaviour: Any) -> Iterator[Served]:
    """A server on a free port of this machine, in threads of this process, until the context ends."""
    served = Served({name: str(place) for name, place in models.items()}, **behaviour)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": served}))
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
