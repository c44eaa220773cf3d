"""The routes of the model server, and what keeps its clients from one another."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from uuid import uuid4

import orjson
from fastapi import Depends, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from prefect_huggingface.deployments.model_server.answers import GenerationResponse, Mailbox
from prefect_huggingface.deployments.model_server.metrics import Metrics
from prefect_huggingface.deployments.model_server.models import ApiError, ServedModel, ServedModels, evict_idle
from prefect_huggingface.deployments.model_server.settings import ServerSettings
from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.openai_protocol import (
    BodyError,
    OpenAICall,
    check_images,
    error_body,
    prompt_characters,
    read_call,
)
from prefect_huggingface.tasks.vector_protocol import (
    EMBEDDINGS_URL,
    RERANK_URL,
    VectorCall,
    read_embedding_call,
    read_rerank_call,
)

BODY_SECONDS = 60.0
# More characters than this for each token of the context are too many in any language.
CHARACTERS_PER_TOKEN = 64
DEFAULT_CONTEXT = 32_768
MAX_IMAGES = 16
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]"}


VECTOR_URLS = {"feature-extraction": EMBEDDINGS_URL, "text-ranking": RERANK_URL}
Call = OpenAICall | VectorCall
Route = Callable[[Request], Awaitable[Response]]
READERS: dict[str, Callable[[dict[str, Any]], Call]] = {
    "/v1/chat/completions": partial(read_call, chat=True), "/v1/completions": partial(read_call, chat=False),
    EMBEDDINGS_URL: read_embedding_call, RERANK_URL: read_rerank_call, "/rerank": read_rerank_call,
}  # fmt: skip


class ModelServer:
    """What the routes do."""

    def __init__(self, models: ServedModels, settings: ServerSettings) -> None:
        self.models, self.settings, self.metrics = models, settings, Metrics(models)
        self._mailbox: Mailbox | None = None
        self._loads: list[asyncio.Future[Engine]] = []

    @asynccontextmanager
    async def run(self, _: FastAPI) -> AsyncIterator[None]:
        """Do what a server does beside its requests."""
        self._mailbox = Mailbox(asyncio.get_running_loop())
        if self.settings.preload:
            self._loads = [model.load() for model in self.models]
        eviction = asyncio.ensure_future(evict_idle(self.settings.idle_minutes))
        yield
        eviction.cancel()

    async def health(self) -> Response:
        """Answer 200 once the models that are to be loaded at the start are."""
        if not all(load.done() for load in self._loads):
            return _json({"status": "loading"}, 503)
        errors = [str(error) for load in self._loads if (error := load.exception()) is not None]
        return _json({"status": "failed", "errors": errors}, 503) if errors else _json({"status": "ok"})

    async def list_models(self) -> Response:
        """Return all models."""
        return _json({"object": "list", "data": [_describe(model) for model in self.models]})

    async def read_model(self, name: str) -> Response:
        """Return one model."""
        return _json(_describe(self.models.find(name)))

    async def read_metrics(self) -> Response:
        """Return the counters."""
        return Response(self.metrics.write(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def route(self, read: Callable[[dict[str, Any]], Call]) -> Route:
        """Return the route for bodies of one kind."""

        async def answer(request: Request) -> Response:
            call = read(await self._read_body(request))
            if isinstance(call, OpenAICall):
                check_images(call, MAX_IMAGES, self.settings.allow_remote_images)
            model = self.models.find(call.model)
            if (call.url if isinstance(call, VectorCall) else None) != VECTOR_URLS.get(model.block.task):
                text = f"The model {model.name!r} is for {model.block.task}, not for this route. Use another one."
                raise ApiError(400, "model_not_supported", text, "model")
            if self.models.requests >= self.settings.max_requests:
                text = f"The server works on {self.models.requests} requests already. Try again in a moment."
                raise ApiError(429, "rate_limited", text, retry_after=1)
            assert self._mailbox is not None
            return GenerationResponse(call, model, uuid4().hex[:20], self._mailbox, self.metrics, check_prompts)

        return answer

    async def tokenize(self, request: Request) -> Response:
        """Count the tokens of a text."""
        body = await self._read_body(request)
        text, name = body.get("prompt"), body.get("model")
        if not isinstance(text, str):
            raise ApiError(400, "invalid_prompt", f"`prompt` must be a text, got {text!r:.100}. Give one.", "prompt")
        async with self.models.find(name).use() as engine:
            check_length(len(text), engine)
            count = await asyncio.to_thread(engine.count_tokens, text)
            return _json({"count": count, "max_model_len": engine.context_length})

    async def _read_body(self, request: Request) -> dict[str, Any]:
        """Return the JSON object of a body; read no more of it than is allowed."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # A web page may send a form to any address of this machine, but no JSON.
            raise ApiError(415, "invalid_body", "The body must be JSON. Send `Content-Type: application/json`.")
        limit, content = int(self.settings.max_body_mb * 10**6), bytearray()
        too_large = ApiError(413, "body_too_large", f"The body has more than {limit:,} bytes. Send less.")
        if int(request.headers.get("content-length", 0)) > limit:
            raise too_large
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    content += part
                    if len(content) > limit:
                        raise too_large
        except (TimeoutError, ClientDisconnect):
            raise ApiError(408, "body_timeout", f"The body took more than {BODY_SECONDS:g} s. Send it again.") from None
        try:
            body = orjson.loads(content)
        except orjson.JSONDecodeError as exc:
            raise ApiError(400, "invalid_body", f"The body is no JSON: {exc}. Correct it.") from None
        if not isinstance(body, dict):
            raise ApiError(400, "invalid_body", f"The body must be an object, got {type(body).__name__}. Correct it.")
        return body


def check_prompts(call: Call, engine: Engine) -> None:
    """Refuse prompts that no tokenizer needs to see to find them too long.

    Raises:
        ApiError: If a prompt is too long.
    """
    for request in call.requests:
        check_length(prompt_characters(request), engine)


def check_length(characters: int, engine: Engine) -> None:
    """Refuse a text of so many characters where it cannot fit the context.

    Raises:
        ApiError: If it is too long.
    """
    limit = CHARACTERS_PER_TOKEN * (engine.context_length or DEFAULT_CONTEXT)
    if characters > limit:
        text = f"The prompt has {characters:,} characters, more than {limit:,} cannot fit the context. Shorten it."
        raise ApiError(400, "too_long", text)


def _describe(model: ServedModel) -> dict[str, Any]:
    card = {"id": model.name, "object": "model", "created": model.created, "owned_by": "prefect-huggingface"}
    return {**card, "parent": model.base} if model.base is not None else card


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


def create_app(models: ServedModels, settings: ServerSettings, api_keys: Sequence[str] = ()) -> FastAPI:
    """Return the application of a server."""
    server = ModelServer(models, settings)
    app = FastAPI(title="prefect-huggingface", lifespan=server.run, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/health", server.health)
    guard: Any = {"dependencies": [Depends(_guard(api_keys))], "response_model": None}
    app.add_api_route("/metrics", server.read_metrics, **guard)
    app.add_api_route("/v1/models", server.list_models, **guard)
    app.add_api_route("/v1/models/{name:path}", server.read_model, **guard)
    app.add_api_route("/tokenize", server.tokenize, methods=["POST"], **guard)
    for path, read in READERS.items():
        app.add_api_route(path, server.route(read), methods=["POST"], **guard)
    app.add_exception_handler(BodyError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_unknown_url)
    app.add_exception_handler(Exception, _answer_failure)
    return app


def _guard(api_keys: Sequence[str]) -> Any:
    keys = [f"Bearer {key}".encode() for key in api_keys]

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        # All keys are compared, so that the time tells nothing.
        if keys and not sum(hmac.compare_digest(given, key) for key in keys):
            raise ApiError(401, "invalid_api_key", "The API key is missing or wrong. Send `Authorization: Bearer KEY`.")
        host = request.headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if not keys and name not in LOOPBACK_NAMES:
            # A web page can have its own name point to this machine.
            raise ApiError(403, "invalid_host", f"This server is for this machine only, not for {name!r:.100}.")

    return check


async def _answer_error(_: Request, exc: Any) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if exc.status == 401 else {}
    if exc.retry_after is not None:
        headers["Retry-After"] = str(exc.retry_after)
    return _json(error_body(exc.code, str(exc), exc.param, exc.status), exc.status, headers)


async def _answer_unknown_url(request: Request, exc: Any) -> Response:
    text = f"{request.method} {request.url.path[:100]!r} is not known here."
    return _json(error_body("unknown_url", text, status=exc.status_code), exc.status_code, exc.headers)


async def _answer_failure(_: Request, exc: Any) -> Response:
    return _json(error_body("engine_error", "The server failed. Look at its log.", status=500), 500)
