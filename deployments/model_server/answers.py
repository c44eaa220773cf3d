"""Answers to generation requests: whole or as server-sent events, from the engines' threads to the event loop.

A client that goes away cancels what it asked for, which frees its place in the batch at the next step.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefect_huggingface.deployments.model_server.metrics import Metrics
from prefect_huggingface.deployments.model_server.models import ApiError, ServedModel
from prefect_huggingface.tasks.engines.base import Engine
from prefect_huggingface.tasks.openai_protocol import AnswerStream, OpenAICall, error_body, error_status
from prefect_huggingface.tasks.records import Completion
from prefect_huggingface.tasks.vector_protocol import VectorCall

# A stream that has nothing to say for so long says that it is there, and a client that reads nothing is given up.
PING_SECONDS = 15.0
SEND_SECONDS = 60.0
JSON_TYPE, EVENT_TYPE = b"application/json", b"text/event-stream; charset=utf-8"


class Reasoning(str):
    """A piece of what the model thinks before its answer."""


class Mailbox:
    """Brings what the threads of engines say to one event loop.

    A step of a batch says something to every stream. The loop is woken once for all of it, not once for each.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._letters: deque[tuple[Inbox, Any]] = deque()
        self._woken = False

    def post(self, inbox: Inbox, item: Any) -> None:
        """Bring an item to an inbox; from any thread."""
        self._letters.append((inbox, item))
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed, so that nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False
        while self._letters:
            inbox, item = self._letters.popleft()
            inbox.put(item)


class Inbox:
    """What has come for one stream."""

    def __init__(self) -> None:
        self._items: list[Any] = []
        self._filled = asyncio.Event()

    def put(self, item: Any) -> None:
        """Add an item."""
        self._items.append(item)
        self._filled.set()

    async def take(self) -> list[Any]:
        """Return all items that have come; wait for one."""
        await self._filled.wait()
        self._filled.clear()
        items, self._items = self._items, []
        return items


class GenerationResponse(Response):
    """The answer to one call. It loads the model, submits the requests and sends what comes of them.

    Args:
        call: What is asked for.
        model: Model that is asked.
        name: Name of the answer, unique in this server.
        mailbox: Brings text from the engine.
        metrics: Counts what happens.
        check: Called with the engine before anything is submitted; raises where the call is not for it.
    """

    def __init__(
        self,
        call: OpenAICall | VectorCall,
        model: ServedModel,
        name: str,
        mailbox: Mailbox,
        metrics: Metrics,
        check: Callable[[Engine], None],
    ) -> None:
        self._call, self._model, self._mailbox, self._metrics, self._check = call, model, mailbox, metrics, check
        self._writer: Any = call.writer(name, int(time.time()), model.name)
        self._began = time.perf_counter()
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, or cancel everything when the client goes away."""
        work = asyncio.ensure_future(self._answer(send))
        watch = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not work.done():
                work.cancel()
                with suppress(asyncio.CancelledError):
                    await work
                self._metrics.count_abort(self._model.name)
        if not work.cancelled():
            work.result()

    async def _answer(self, send: Send) -> None:
        async with self._model.use() as engine:
            self._check(engine)
            futures: list[Future[Completion]] = []
            try:
                if isinstance(self._call, OpenAICall) and self._call.stream:
                    await self._send_events(self._call, engine, futures, send)
                else:
                    futures += [engine.submit(request) for request in self._call.requests]
                    completions = await asyncio.gather(*map(asyncio.wrap_future, futures))
                    self._finish(completions)
                    await _send_all(send, self._writer.write(completions))
            finally:
                for future in futures:
                    future.cancel()

    def _finish(self, completions: Sequence[Completion]) -> None:
        for completion in completions:
            self._metrics.count(self._model.name, completion, time.perf_counter() - self._began)
            if completion.error is not None:
                raise failure_of(completion)

    async def _send_events(
        self, call: OpenAICall, engine: Engine, futures: list[Future[Completion]], send: Send
    ) -> None:
        inbox, events = Inbox(), EventSender(send)
        futures += [self._submit(engine, request, each, inbox) for each, request in enumerate(call.requests)]
        stream = AnswerStream(call, self._writer)
        try:
            while len(stream.completions) < len(futures):
                try:
                    # `asyncio.wait_for` of Python 3.11 loses a cancellation that comes together with an item.
                    async with asyncio.timeout(PING_SECONDS):
                        items = await inbox.take()
                except TimeoutError:
                    await events.ping()
                    continue
                await events.send(self._chunks_of(items, stream, events.begun))
        except ApiError as exc:
            if not events.begun:
                raise
            await events.send([error_body(exc.code, str(exc), status=exc.status)])
        else:
            if call.include_usage:
                await events.send([self._writer.write_usage(list(stream.completions.values()))])
        await events.end()

    def _chunks_of(self, items: Sequence[Any], stream: AnswerStream, begun: bool) -> list[dict[str, Any]]:
        if not begun and isinstance(items[0][1], str):
            self._metrics.count_first_token(self._model.name, time.perf_counter() - self._began)
        chunks: list[dict[str, Any]] = []
        for number, item in items:
            if isinstance(item, Reasoning):
                chunks += stream.think(number, item)
            elif isinstance(item, str):
                chunks += stream.go_on(number, item)
            else:
                self._finish([item])
                chunks += stream.end(number, item)
        return chunks

    def _submit(self, engine: Engine, request: Any, number: int, inbox: Inbox) -> Future[Completion]:
        def tell(future: Future[Completion]) -> None:
            if not future.cancelled():
                self._mailbox.post(inbox, (number, future.result()))

        def think(text: str) -> None:
            self._mailbox.post(inbox, (number, Reasoning(text)))

        future = engine.submit(request, lambda text: self._mailbox.post(inbox, (number, text)), think)
        future.add_done_callback(tell)
        return future


class EventSender:
    """Sends server-sent events. The headers go with the first one, so that an early error still has its status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def send(self, chunks: Sequence[Mapping[str, Any]]) -> None:
        """Send some events."""
        if chunks:
            await self._write(b"".join(b"data: %b\n\n" % orjson.dumps(chunk) for chunk in chunks))

    async def ping(self) -> None:
        """Send a comment, which clients leave out."""
        await self._write(b": the answer is on its way\n\n")

    async def end(self) -> None:
        """Send the end of the stream."""
        await self._write(b"data: [DONE]\n\n", more=False)

    async def _write(self, content: bytes, more: bool = True) -> None:
        if not self.begun:
            self.begun = True
            headers = [(b"content-type", EVENT_TYPE), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        async with asyncio.timeout(SEND_SECONDS):
            await self._send({"type": "http.response.body", "body": content, "more_body": more})


def failure_of(completion: Completion) -> ApiError:
    """Return the error that a failed completion is answered with."""
    status = error_status(completion.error_code)
    retry_after = 1 if status in (429, 503) else None
    return ApiError(status, completion.error_code, completion.error or "", retry_after=retry_after)


async def _send_all(send: Send, body: Mapping[str, Any]) -> None:
    content = orjson.dumps(body)
    headers = [(b"content-type", JSON_TYPE), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
