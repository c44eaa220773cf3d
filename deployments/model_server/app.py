"""The routes of the model server, and what keeps its clients from one another."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from prefect_huggingface.deployments.model_server.answers import Answer, json_response
from prefect_huggingface.deployments.model_server.metrics import Metrics
from prefect_huggingface.deployments.model_server.models import ServedModels, evict_idle
from prefect_huggingface.deployments.model_server.settings import LOOPBACK_HOSTS, ServerSettings
from prefect_huggingface.tasks.engines.base import Mailbox, RequestError
from prefect_huggingface.tasks.engines.inputs import check_characters
from prefect_huggingface.tasks.openai_protocol import BodyError, check_images, parse_body
from prefect_huggingface.tasks.vector_protocol import READERS, TEXT_URLS, VECTOR_URLS

BODY_SECONDS = 60.0
MAX_IMAGES = 16


class ModelServer:
    """What the routes do."""

    def __init__(self, models: ServedModels, settings: ServerSettings, api_keys: Sequence[str]) -> None:
        self.models, self.settings, self.metrics = models, settings, Metrics(models)
        self._keys = [f"Bearer {key}".encode() for key in api_keys]

    @asynccontextmanager
    async def run(self, _: FastAPI) -> AsyncIterator[None]:
        """Do what a server does beside its requests."""
        self._mailbox = Mailbox()
        # Of a load, its end is kept and not the engine, which would count as used for ever.
        self._loads = [asyncio.ensure_future(_error_of(model.load())) for model in self.models if self.settings.preload]
        eviction = asyncio.ensure_future(evict_idle(self.settings.idle_minutes))
        yield
        eviction.cancel()

    async def health(self) -> Response:
        """Answer 200 once the models that are to be loaded at the start are."""
        if not all(load.done() for load in self._loads):
            return json_response({"status": "loading"}, 503)
        errors = [error for load in self._loads if (error := load.result()) is not None]
        return json_response({"status": "failed", "errors": errors}, 503) if errors else json_response({"status": "ok"})

    async def list_models(self) -> Response:
        """Return all models."""
        return json_response({"object": "list", "data": [model.card for model in self.models]})

    async def read_model(self, name: str) -> Response:
        """Return one model."""
        return json_response(self.models.find(name).card)

    async def read_metrics(self) -> Response:
        """Return the counters."""
        return Response(self.metrics.write(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def answer(self, request: Request) -> Response:
        """Return the answer to a call of one of the routes of OpenAI."""
        body, path = await self._read_body(request), request.url.path
        defaults = {"defaults": self.models.options_of(body.get("model"))} if path in TEXT_URLS else {}
        call = READERS[path](body, **defaults)
        check_images(call.requests, MAX_IMAGES, self.settings.allow_remote_images)
        model = self.models.find(call.model)
        if call.url not in VECTOR_URLS.get(model.block.task, TEXT_URLS):
            text = f"The model {model.name!r} is for {model.block.task}, not for this route. Use another one."
            raise BodyError("model_not_supported", text, "model")
        if self.models.requests >= self.settings.max_requests:
            text = f"The server works on {self.models.requests} requests already. Try again in a moment."
            raise BodyError("rate_limited", text, status=429, retry_after=1)
        return Answer(call, model, self._mailbox, self.metrics)

    async def tokenize(self, request: Request) -> Response:
        """Count the tokens of a text."""
        body = await self._read_body(request)
        text = body.get("prompt")
        if not isinstance(text, str):
            raise BodyError("invalid_prompt", f"`prompt` must be a text, got {text!r:.100}. Give one.", "prompt")
        async with self.models.find(body.get("model")).use() as engine:
            check_characters(text, engine.context_length)
            count = await asyncio.to_thread(engine.count_tokens, text)
            return json_response({"count": count, "max_model_len": engine.context_length})

    async def _read_body(self, request: Request) -> dict[str, Any]:
        """Return the JSON object of a body; read no more of it than is allowed."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A web page may send a form to any address of this machine, but no JSON.
            raise BodyError("invalid_body", "The body must be JSON. Send the type application/json.", status=415)
        limit, content = int(self.settings.max_body_mb * 10**6), bytearray()
        too_large = BodyError("body_too_large", f"The body has more than {limit:,} bytes. Send less.", status=413)
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    content += part
                    if len(content) > limit:
                        raise too_large
        except (TimeoutError, ClientDisconnect):
            text = f"The body took more than {BODY_SECONDS:g} s. Send it again."
            raise BodyError("body_timeout", text, status=408) from None
        return parse_body(content)

    async def guard(self, request: Request) -> None:
        """Refuse who has no key and, where there is none, who does not ask for this machine by its own name.

        Raises:
            BodyError: If the request is refused.
        """
        given = request.headers.get("authorization", "").encode()
        # All keys are compared, so that the time tells nothing.
        if self._keys and not sum(hmac.compare_digest(given, key) for key in self._keys):
            raise BodyError("invalid_api_key", "The API key is wrong. Send `Authorization: Bearer KEY`.", status=401)
        host = request.headers.get("host", "").lower()
        name = (host if host.endswith("]") else host.rpartition(":")[0] or host).strip("[]")
        if not self._keys and name not in LOOPBACK_HOSTS:
            # A web page can have its own name point to this machine.
            raise BodyError("invalid_host", f"This server is for this machine only, not for {name!r:.100}.", status=403)


async def _error_of(load: Awaitable[object]) -> str | None:
    """Wait for the end of a load, and return what went wrong."""
    try:
        await load
    except Exception as exc:
        return str(exc)
    return None


def create_app(models: ServedModels, settings: ServerSettings, api_keys: Sequence[str] = ()) -> FastAPI:
    """Return the application of a server."""
    server = ModelServer(models, settings, api_keys)
    app = FastAPI(lifespan=server.run, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/health", server.health)
    guard: Any = {"dependencies": [Depends(server.guard)], "response_model": None}
    app.add_api_route("/metrics", server.read_metrics, **guard)
    app.add_api_route("/v1/models", server.list_models, **guard)
    app.add_api_route("/v1/models/{name:path}", server.read_model, **guard)
    for path in READERS:
        app.add_api_route(path, server.answer, methods=["POST"], **guard)
    app.add_api_route("/tokenize", server.tokenize, methods=["POST"], **guard)
    for kind in (BodyError, RequestError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    return app


async def _answer_error(request: Request, exc: Exception) -> Response:
    headers = dict(exc.headers or {}) if isinstance(exc, HTTPException) else {}
    if isinstance(exc, HTTPException):
        text = f"{request.method} {request.url.path[:100]!r} is not known here."
        exc = BodyError("unknown_url", text, status=exc.status_code)
    error = BodyError.of(exc)
    return json_response(error.body, error.status, {**headers, **error.headers})
