"""Streams that end with the completion, so that counts and the finish reason are known at their end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Generator, Iterator
from concurrent.futures import Future
from functools import partial

from prefect_huggingface.tasks.engines.base import Engine, checked
from prefect_huggingface.tasks.records import Completion, Request


def stream_completion(engine: Engine, request: Request) -> Iterator[str | Completion]:
    """Yield the text of a request piece by piece, and then its completion.

    Closing the iterator cancels the request.

    Raises:
        GenerationError: If the request fails, as soon as it does.
    """
    completion = yield from engine.stream(request)
    yield completion


async def astream_completion(engine: Engine, request: Request) -> AsyncIterator[str | Completion]:
    """Yield the text of a request piece by piece, and then its completion, without a thread of its own.

    Raises:
        GenerationError: If the request fails, as soon as it does.
    """
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[str | None] = asyncio.Queue()

    def hand_over(piece: str | None) -> None:
        # The loop may be closed when a request that nobody waits for ends.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    future = engine.submit(request, hand_over)
    future.add_done_callback(lambda _: hand_over(None))
    try:
        while (piece := await pieces.get()) is not None:
            yield piece
    finally:
        future.cancel()
    yield checked(future.result())


async def acomplete(engine: Engine, request: Request) -> Completion:
    """Return the completion of a request. Cancelling the caller cancels the request.

    Raises:
        GenerationError: If the request fails.
    """
    loop = asyncio.get_running_loop()
    future: Future[Completion] = await loop.run_in_executor(None, partial(engine.submit, request))
    return checked(await asyncio.wrap_future(future))


def complete(engine: Engine, requests: list[Request], in_flight: int | None = None) -> list[Completion]:
    """Return the completions of requests with ids 0, 1, ..., in their order.

    Raises:
        GenerationError: If a request fails. The others are cancelled.
    """
    finished = engine.generate(requests, in_flight)
    try:
        completions = {completion.request_id: checked(completion) for completion in finished}
    finally:
        # The traceback of an error would keep the generator, and with it the other requests, alive.
        if isinstance(finished, Generator):
            finished.close()
    return [completions[request.id] for request in requests]
