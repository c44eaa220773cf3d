"""What every engine does: turn requests into completions, for any number of callers at once."""

from __future__ import annotations

import asyncio
import itertools
import queue
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.errors import GenerationError
from prefect_huggingface.tasks.records import Completion, ErrorCode, Request
from prefect_huggingface.tasks.waiting import WAKE_SECONDS

if TYPE_CHECKING:
    from prefect_huggingface.tasks.engines.inputs import InputProcessor

T = TypeVar("T")

OnText = Callable[[str], None]
"""Called in the engine's thread with each new piece of text; it must return quickly."""


class Reasoning(NamedTuple):
    """A piece of the reasoning of a model."""

    text: str


Piece = str | Reasoning | Completion
"""What comes of a request while it runs: text of the answer, reasoning, and at its end the completion."""


class RequestError(Exception):
    """One request cannot be worked on. It never leaves an engine: it becomes the error of a completion.

    Attributes:
        code: Kind of the error.
        prompt_tokens: Number of tokens of the prompt, 0 where it is not known.
    """

    def __init__(self, code: ErrorCode, message: str, prompt_tokens: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.prompt_tokens = prompt_tokens


class Engine(ABC):
    """A loaded model. All methods may be called from any thread.

    Attributes:
        in_flight: How many requests `generate` keeps in flight, so that the batches of the engine stay full.
        inputs: Makes the prompts of the model; None where a server does it. It knows the chat template.
        failure: Why the engine can be used no more, or None. The next `load_engine` loads another one.
        on_close: Called when the model was let go of.
    """

    in_flight: int = 64
    inputs: InputProcessor | None = None
    failure: str | None = None
    on_close: Callable[[], None] | None = None

    @abstractmethod
    def submit(
        self, request: Request, on_text: OnText | None = None, on_reasoning: OnText | None = None
    ) -> Future[Completion]:
        """Queue a request and return the future of its completion.

        The future never raises for a failed request: the completion has the error. Cancelling the future cancels
        the request, also while it runs.

        Args:
            request: What to generate.
            on_text: Receives the text piece by piece as it comes. Its pieces together are the text of the completion.
            on_reasoning: Receives the reasoning of the model in the same way, where the model shows it.
        """

    @abstractmethod
    def close(self) -> None:
        """End the engine and free its memory. Requests that are not done end as cancelled."""

    @staticmethod
    def tuned(model: LocalModel, folder: Path) -> LocalModel:
        """Return the model with the settings that were found for its folder on this machine, if there are any."""
        return model

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""

    @property
    @abstractmethod
    def context_length(self) -> int | None:
        """Number of tokens that prompt and answer may have together, or None where it is not known."""

    @property
    def cache_usage(self) -> float:
        """Share of the KV cache that is in use, 0 to 1; 0 where the engine does not tell."""
        return 0.0

    @property
    def outside_bytes(self) -> int:
        """Resident memory of further processes that belong to the engine."""
        return 0

    def generate(self, requests: Iterable[Request], in_flight: int | None = None) -> Generator[Completion, None, None]:
        """Yield the completions of many requests as they finish. Closing the iterator cancels those under way.

        Args:
            requests: Pulled lazily, never more than `in_flight` ahead of what is finished.
            in_flight: Upper limit of requests that are queued or running.
        """
        limit = in_flight or self.in_flight
        source = iter(requests)
        finished: queue.SimpleQueue[Future[Completion]] = queue.SimpleQueue()
        pending: set[Future[Completion]] = set()
        try:
            while True:
                for request in itertools.islice(source, limit - len(pending)):
                    future = self.submit(request)
                    pending.add(future)
                    future.add_done_callback(finished.put)
                if not pending:
                    return
                future = _next_of(finished)
                pending.remove(future)
                yield future.result()
        finally:
            for future in pending:
                future.cancel()

    def answer_all(
        self,
        requests: Sequence[Request],
        in_flight: int | None = None,
        check: Callable[[Completion], object] | None = None,
    ) -> list[Completion]:
        """Return the completions of requests, in their order.

        Args:
            requests: N requests.
            in_flight: Upper limit of requests that are queued or running.
            check: Called with each completion as it comes, whose id is its place. What it raises ends the others.
        """
        numbered = [replace(request, id=place) for place, request in enumerate(requests)]
        found: dict[Any, Completion] = {}
        with closing(self.generate(numbered, in_flight)) as finished:
            for completion in finished:
                if check is not None:
                    check(completion)
                found[completion.request_id] = completion
        return [replace(found[place], request_id=request.id) for place, request in enumerate(requests)]

    def stream(self, request: Request) -> Generator[str, None, Completion]:
        """Yield the text of one request piece by piece as it is generated. Closing the iterator cancels the request.

        Returns:
            The completion, which `yield from` gives.

        Raises:
            GenerationError: If the request fails, as soon as it does.
        """
        with closing(self.stream_pieces(request)) as pieces:
            for piece in pieces:
                if isinstance(piece, str):
                    yield piece
        assert isinstance(piece, Completion)
        return piece

    def stream_pieces(self, request: Request) -> Generator[Piece, None, None]:
        """Yield text and reasoning of one request as they are generated, and then its completion.

        Closing the iterator cancels the request.

        Raises:
            GenerationError: If the request fails, as soon as it does.
        """
        pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        future = self.submit(request, pieces.put, lambda text: pieces.put(Reasoning(text)))
        future.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := _next_of(pieces)) is not None:
                yield piece
        finally:
            future.cancel()
        yield checked(future.result())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Mailbox:
    """Brings what comes of requests from the threads of their engines to one event loop.

    A step of a batch brings something for every stream. The loop is woken once for all of it, not once for each.
    """

    def __init__(self) -> None:
        """Belong to the event loop that runs."""
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[tuple[Inbox, int, Piece]] = deque()
        self._woken = False

    def post(self, inbox: Inbox, number: int, piece: Piece) -> None:
        """Bring a piece of a request to an inbox, from any thread."""
        self._arrived.append((inbox, number, piece))
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed, so that nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False
        while self._arrived:
            inbox, number, piece = self._arrived.popleft()
            inbox.pieces.append((number, piece))
            inbox.filled.set()


class Inbox:
    """Where one reader in an event loop finds what comes of its requests."""

    def __init__(self, mailbox: Mailbox | None = None) -> None:
        """Take the mailbox of the event loop, where several readers share one."""
        self._mailbox = mailbox or Mailbox()
        self.pieces: list[tuple[int, Piece]] = []
        self.filled = asyncio.Event()

    def submit(self, engine: Engine, request: Request, number: int = 0) -> Future[Completion]:
        """Submit a request whose pieces come here with its number; from any thread."""
        post = partial(self._mailbox.post, self, number)
        future = engine.submit(request, post, lambda text: post(Reasoning(text)))
        future.add_done_callback(lambda done: None if done.cancelled() else post(done.result()))
        return future

    async def take(self, seconds: float | None = None) -> list[tuple[int, Piece]]:
        """Return all that has come, each piece with the number of its request; nothing after so many seconds."""
        if not self.pieces:
            self.filled.clear()
            with suppress(TimeoutError):
                # `asyncio.wait_for` of Python 3.11 loses a cancellation that comes together with a result.
                async with asyncio.timeout(seconds):
                    await self.filled.wait()
        pieces, self.pieces = self.pieces, []
        return pieces


def checked(completion: Completion) -> Completion:
    """Return a completion that has no error.

    Raises:
        GenerationError: With the message of the completion's error, if it has one.
    """
    if completion.error is not None:
        raise GenerationError(completion.error, error_code=completion.error_code, request_id=completion.request_id)
    return completion


def _next_of(items: queue.SimpleQueue[T]) -> T:
    # Prefect ends a flow that is late by an exception in its thread, which no blocking call notices.
    while True:
        with suppress(queue.Empty):
            return items.get(timeout=WAKE_SECONDS)
