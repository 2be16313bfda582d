"""A server that speaks OpenAI's completions protocol: how it is reached, and what it may answer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from spd_lens.errors import SPDError, one_line, shortened

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal
    from openai import AsyncOpenAI

DEFAULT_TIMEOUT = 600.0
DEFAULT_RETRIES = 5
_CONNECT = 10.0
"""Seconds in which a connection must be there; an answer may take much longer."""


class Refused(SPDError):
    """The server does not take a request of this form (HTTP 400 or 422)."""


class Choice(BaseModel):
    """One completion of an answer."""

    text: str
    finish_reason: str
    token_ids: list[int] | None = None
    """What was generated, through the token that ended it; only some servers say it."""
    prompt_token_ids: list[int] | None = None


class Usage(BaseModel):
    """How many tokens the server counted."""

    prompt_tokens: int
    completion_tokens: int | None = None


class Answer(BaseModel):
    """What a server answers to a prompt, as far as it is read."""

    choices: list[Choice]
    usage: Usage | None = None
    system_fingerprint: str | None = None


@dataclass(frozen=True)
class Connection:
    """An open connection to a server, whose requests run in a thread of their own."""

    url: str
    portal: BlockingPortal
    client: AsyncOpenAI

    def about(self) -> tuple[list[str], str]:
        """The names of the models that are served, and the software as it calls itself: a name and a version."""
        import openai

        async def look() -> tuple[list[str], str]:
            once = self.client.with_options(max_retries=0)
            with _explained(self.url):
                try:
                    listed = (await once.models.with_raw_response.list()).http_response
                except openai.APIStatusError as error:  # not every server has a list, nor one that works
                    listed = error.response
            models = _Models.model_validate_json(listed.content).data if listed.is_success else []
            version = None
            with contextlib.suppress(openai.OpenAIError, ValueError):  # few servers have it, or say it in this form
                root = self.url.rstrip("/").removesuffix("/v1")
                version = _Version.model_validate(await once.get(f"{root}/version", cast_to=object)).version
            maker = next((model.owned_by for model in models if model.owned_by), None)
            parts = [maker, version] if version else [listed.headers.get("server") or maker]
            return [model.id for model in models], " ".join(part for part in parts if part)

        try:
            return self.portal.call(look)
        except ValidationError as error:
            raise SPDError(f"{self.url}/models is no list of models; give the address that ends in /v1") from error

    def ask(self, request: dict[str, Any]) -> Future[Answer]:
        """Send a request; its answer, or an `SPDError` that says in one sentence what went wrong."""

        async def send() -> Answer:
            with _explained(self.url):
                raw = await self.client.completions.with_raw_response.create(**request)
                return Answer.model_validate_json(raw.http_response.content)

        return self.portal.start_task_soon(send)


class _Model(BaseModel):
    id: str
    owned_by: str | None = None


class _Models(BaseModel):
    data: list[_Model]


class _Version(BaseModel):
    version: str


@contextlib.contextmanager
def connected(url: str, timeout: float | None, retries: int | None) -> Iterator[Connection]:
    """Open a connection; what is still in flight when the context ends is dropped.

    Time-outs, lost connections and the answers 408, 409, 429 and 5xx are tried again, later and later (with jitter, at
    most 8 seconds, or what `Retry-After` says). A key for the server is read from the variable `OPENAI_API_KEY`.

    Args:
        url: The server's address, through `/v1`.
        timeout: Seconds that an answer may take.
        retries: How often a request is tried again.

    Raises:
        SPDError: The package openai is not installed.
    """
    try:
        from anyio.from_thread import start_blocking_portal
        from openai import AsyncOpenAI, Timeout
    except ImportError as error:
        raise SPDError("the engine 'openai' needs the package openai: pip install 'spd-lens[servers]'") from error
    timeout = DEFAULT_TIMEOUT if timeout is None else timeout
    client = AsyncOpenAI(
        base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"),
        timeout=Timeout(timeout, connect=min(_CONNECT, timeout)),
        max_retries=DEFAULT_RETRIES if retries is None else retries,
    )  # fmt: skip
    # a thread of its own, since a notebook's has an event loop already
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(client):
        yield Connection(url, portal, client)


def check_url(url: str | None) -> None:
    """Raise `SPDError` if this is no address of a server, or holds a password."""
    if url is None:
        raise SPDError("the engine 'openai' needs engine_url, the server's address, such as http://localhost:8000/v1")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SPDError(f"engine_url {url!r} is no address of a server; write it as http://localhost:8000/v1")
    if parts.password:
        raise SPDError("engine_url holds a password, which would be written into files; set OPENAI_API_KEY instead")


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Raise what goes wrong inside as an `SPDError`."""
    import openai

    kept = "what was written is kept, and the same again continues"
    try:
        yield
    except openai.APIConnectionError as error:
        if isinstance(error, openai.APITimeoutError) and "Connect" not in type(error.__cause__).__name__:
            raise SPDError(
                f"the server at {url} took longer than engine_timeout; give it more time or lower engine_concurrency "
                f"({kept})"
            ) from error
        why = one_line(error.__cause__ or error)
        raise SPDError(
            f"no answer from the server at {url} ({why}); start it or correct engine_url ({kept})"
        ) from error
    except openai.APIStatusError as error:
        says = shortened(" ".join(error.response.text.split()), 200)
        kind = Refused if error.status_code in (400, 422) else SPDError
        hint = {401: "set OPENAI_API_KEY; ", 403: "set OPENAI_API_KEY; ", 404: "look at engine_url and engine_model; "}
        raise kind(
            f"the server at {url} answers HTTP {error.status_code} ({says}); {hint.get(error.status_code, '')}{kept}"
        ) from error
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise SPDError(
            f"the server at {url} answered something that is no completion ({place + ': ' if place else ''}"
            f"{shortened(problem['msg'], 100)}); {kept}"
        ) from error
