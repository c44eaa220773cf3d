"""What every engine does: turn requests into completions, for any number of callers at once."""

from __future__ import annotations

import itertools
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.errors import GenerationError
from prefect_huggingface.tasks.records import Completion, ErrorCode, Request

if TYPE_CHECKING:
    from prefect_huggingface.tasks.engines.inputs import InputProcessor

T = TypeVar("T")

OnText = Callable[[str], None]
"""Called in the engine's thread with each new piece of text; it must return quickly."""

# Prefect ends a flow that is late by an exception in its thread, which no blocking call notices.
WAKE_SECONDS = 0.5


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

    def request_close(self) -> None:
        """Close the engine soon. It does not wait, so that the garbage collector may call it."""
        threading.Thread(target=self.close, name="close-engine", daemon=True).start()

    def abandon(self, reason: str) -> None:
        """Fail from now on, without touching any thread: a forked process has none of them."""
        self.failure = reason

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

    def stream(self, request: Request) -> Generator[str, None, Completion]:
        """Yield the text of one request piece by piece as it is generated. Closing the iterator cancels the request.

        Returns:
            The completion, which `yield from` gives.

        Raises:
            GenerationError: If the request fails, as soon as it does.
        """
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        future = self.submit(request, pieces.put)
        future.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := _next_of(pieces)) is not None:
                yield piece
        finally:
            future.cancel()
        return checked(future.result())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checked(completion: Completion) -> Completion:
    """Return a completion that has no error.

    Raises:
        GenerationError: With the message of the completion's error, if it has one.
    """
    if completion.error is not None:
        raise GenerationError(completion.error, error_code=completion.error_code, request_id=completion.request_id)
    return completion


def _next_of(items: queue.SimpleQueue[T]) -> T:
    while True:
        with suppress(queue.Empty):
            return items.get(timeout=WAKE_SECONDS)
