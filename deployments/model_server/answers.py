"""Answers to calls: whole or as server-sent events, from the engines' threads to the event loop.

A client that goes away cancels what it asked for, which frees its place in the batch at the next step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from typing import Any
from uuid import uuid4

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefect_huggingface.deployments.model_server.metrics import Metrics
from prefect_huggingface.deployments.model_server.models import ServedModel
from prefect_huggingface.tasks.engines.base import Engine, Inbox, Mailbox, Piece
from prefect_huggingface.tasks.openai_protocol import AnswerStream, BodyError
from prefect_huggingface.tasks.records import Completion
from prefect_huggingface.tasks.vector_protocol import Call

# A stream that has nothing to say for so long says that it is there, and a client that reads nothing is given up.
PING_SECONDS, PING = 15.0, b": the answer is on its way\n\n"
SEND_SECONDS = 60.0
# A proxy must not hold events back.
UNBUFFERED = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
EVENT_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), *UNBUFFERED]


class Answer(Response):
    """The answer to one call. It loads the model, submits the requests and sends what comes of them.

    Args:
        call: What is asked for.
        model: Model that is asked.
        mailbox: Brings what the engine says to the event loop.
        metrics: Counts what happens.
    """

    background = None

    def __init__(self, call: Call, model: ServedModel, mailbox: Mailbox, metrics: Metrics) -> None:
        self._call: Any = call
        self._model, self._metrics, self._inbox = model, metrics, Inbox(mailbox)
        self._writer: Any = call.writer(uuid4().hex[:20], int(time.time()), model.name)
        self._futures: list[Future[Completion]] = []
        self._began = time.perf_counter()
        self._is_sent = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, or cancel everything when the client goes away."""
        work = asyncio.ensure_future(self._answer(scope, receive, send))
        watch = asyncio.ensure_future(_disconnected(receive))
        watch.add_done_callback(lambda _: work.cancel())
        try:
            await work
        except asyncio.CancelledError:
            self._metrics.count_abort(self._model.name)
            if not watch.done():  # the server ends
                raise
        finally:
            watch.cancel()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._model.use() as engine:
            try:
                if self._call.stream:
                    return await self._stream(engine, send)
                self._futures = [engine.submit(request) for request in self._call.requests]
                completions = await asyncio.gather(*map(asyncio.wrap_future, self._futures))
                self._count(completions)
                response = json_response(self._writer.write(completions))
                await asyncio.wait_for(response(scope, receive, send), SEND_SECONDS)
            finally:
                for future in self._futures:
                    future.cancel()

    async def _stream(self, engine: Engine, send: Send) -> None:
        """Send events. The headers go with the first one, so that an early error still has its status."""
        requests, stream = self._call.requests, AnswerStream(self._call, self._writer)
        self._futures = [self._inbox.submit(engine, request, number) for number, request in enumerate(requests)]
        end: list[Mapping[str, Any]] = []
        try:
            while len(stream.completions) < len(requests):
                pieces = await self._inbox.take(PING_SECONDS)
                await self._send(send, self._write(stream, pieces) if pieces else PING)
            if self._call.include_usage:
                end = [self._writer.write_usage([*stream.completions.values()])]
        except BodyError as exc:
            if not self._is_sent:
                raise
            end = [exc.body]
        await self._send(send, _events(end) + b"data: [DONE]\n\n", more=False)

    def _write(self, stream: AnswerStream, pieces: Iterable[tuple[int, Piece]]) -> bytes:
        self._count(piece for _, piece in pieces)
        chunks = [chunk for number, piece in pieces for chunk in stream.write(number, piece)]
        if chunks and not self._is_sent:
            self._metrics.count_first_token(self._model.name, time.perf_counter() - self._began)
        return _events(chunks)

    def _count(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, Completion):
                self._metrics.count(self._model.name, piece, time.perf_counter() - self._began)

    async def _send(self, send: Send, content: bytes, more: bool = True) -> None:
        if not self._is_sent and content:
            self._is_sent = True
            await send({"type": "http.response.start", "status": 200, "headers": EVENT_HEADERS})
        if content:
            async with asyncio.timeout(SEND_SECONDS):
                await send({"type": "http.response.body", "body": content, "more_body": more})


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response of JSON."""
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


def _events(chunks: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(b"data: %b\n\n" % orjson.dumps(chunk) for chunk in chunks)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
