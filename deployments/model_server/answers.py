"""Answers to generation requests: whole or as server-sent events, from the engines' threads to the event loop.

A client that goes away cancels what it asked for, which frees its place in the batch at the next step.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
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
from prefect_huggingface.tasks.records import Completion, Request
from prefect_huggingface.tasks.vector_protocol import VectorCall

# A stream that has nothing to say for so long says that it is there, and a client that reads nothing is given up.
PING_SECONDS = 15.0
SEND_SECONDS = 60.0
JSON, EVENTS = "application/json", "text/event-stream; charset=utf-8"

Chunks = Iterable[Mapping[str, Any]]
Letter = Callable[[], Chunks]


class Mailbox:
    """Brings what the threads of engines say to one event loop.

    A step of a batch says something to every stream. The loop is woken once for all of it, not once for each.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._letters: deque[tuple[asyncio.Queue[Letter], Letter]] = deque()
        self._woken = False

    def post(self, inbox: asyncio.Queue[Letter], letter: Letter) -> None:
        """Bring something to an inbox; from any thread."""
        self._letters.append((inbox, letter))
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed, so that nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False
        while self._letters:
            inbox, letter = self._letters.popleft()
            inbox.put_nowait(letter)


class GenerationResponse(Response):
    """The answer to one call. It loads the model, submits the requests and sends what comes of them.

    Args:
        call: What is asked for.
        model: Model that is asked.
        name: Name of the answer, unique in this server.
        mailbox: Brings text from the engine.
        metrics: Counts what happens.
        check: Called with the call and the engine before anything is submitted; raises where the call is not for it.
    """

    def __init__(
        self, call: OpenAICall | VectorCall, model: ServedModel, name: str, mailbox: Mailbox, metrics: Metrics,
        check: Callable[[OpenAICall | VectorCall, Engine], None],
    ) -> None:  # fmt: skip
        self._call, self._model, self._mailbox, self._metrics, self._check = call, model, mailbox, metrics, check
        self._writer: Any = call.writer(name, int(time.time()), model.name)
        self._began = time.perf_counter()
        self._is_sent = False
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
            self._check(self._call, engine)
            futures: list[Future[Completion]] = []
            try:
                if isinstance(self._call, OpenAICall) and self._call.stream:
                    await self._stream(self._call, engine, futures, send)
                    return
                futures += [engine.submit(request) for request in self._call.requests]
                completions = await asyncio.gather(*map(asyncio.wrap_future, futures))
                for completion in completions:
                    self._count(completion)
                await self._send(send, orjson.dumps(self._writer.write(completions)), JSON, more=False)
            finally:
                for future in futures:
                    future.cancel()

    async def _stream(self, call: OpenAICall, engine: Engine, futures: list[Future[Completion]], send: Send) -> None:
        """Send events. The headers go with the first one, so that an early error still has its status."""
        inbox: asyncio.Queue[Letter] = asyncio.Queue()
        stream = AnswerStream(call, self._writer)
        for number, request in enumerate(call.requests):
            futures.append(self._submit(engine, request, number, stream, inbox))
        try:
            while len(stream.completions) < len(futures):
                letters: list[Letter] = []
                with suppress(TimeoutError):
                    # `asyncio.wait_for` of Python 3.11 loses a cancellation that comes together with an item.
                    async with asyncio.timeout(PING_SECONDS):
                        letters.append(await inbox.get())
                while not inbox.empty():
                    letters.append(inbox.get_nowait())
                events = _events(chunk for letter in letters for chunk in letter())
                if not self._is_sent and events:
                    self._metrics.count_first_token(self._model.name, time.perf_counter() - self._began)
                if events or not letters:
                    await self._send(send, events or b": the answer is on its way\n\n", EVENTS)
            end = [self._writer.write_usage([*stream.completions.values()])] if call.include_usage else []
        except ApiError as exc:
            if not self._is_sent:
                raise
            end = [error_body(exc.code, str(exc), status=exc.status)]
        await self._send(send, _events(end) + b"data: [DONE]\n\n", EVENTS, more=False)

    def _submit(
        self, engine: Engine, request: Request, number: int, stream: AnswerStream, inbox: asyncio.Queue[Letter]
    ) -> Future[Completion]:
        def end(future: Future[Completion]) -> None:
            if not future.cancelled():
                self._mailbox.post(inbox, lambda: stream.end(number, self._count(future.result())))

        future = engine.submit(
            request,
            lambda text: self._mailbox.post(inbox, lambda: stream.go_on(number, text)),
            lambda text: self._mailbox.post(inbox, lambda: stream.think(number, text)),
        )
        future.add_done_callback(end)
        return future

    def _count(self, completion: Completion) -> Completion:
        self._metrics.count(self._model.name, completion, time.perf_counter() - self._began)
        if completion.error is None:
            return completion
        status = error_status(completion.error_code)
        code, retry_after = completion.error_code or "engine_error", 1 if status in (429, 503) else None
        raise ApiError(status, code, completion.error, retry_after=retry_after)

    async def _send(self, send: Send, content: bytes, media_type: str, more: bool = True) -> None:
        if not self._is_sent:
            self._is_sent = True
            headers = {"content-type": media_type, "cache-control": "no-cache", "x-accel-buffering": "no"}
            if not more:
                headers["content-length"] = str(len(content))
            pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": pairs})
        async with asyncio.timeout(SEND_SECONDS):
            await send({"type": "http.response.body", "body": content, "more_body": more})


def _events(chunks: Chunks) -> bytes:
    return b"".join(b"data: %b\n\n" % orjson.dumps(chunk) for chunk in chunks)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
