"""What every engine does: turn requests into completions, for any number of callers at once."""

from __future__ import annotations

import itertools
import queue
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Self

from prefect_huggingface.tasks.errors import GenerationError
from prefect_huggingface.tasks.records import Completion, Request
from prefect_huggingface.tasks.waiting import take_next

if TYPE_CHECKING:
    from prefect_huggingface.tasks.engines.prompts import PromptWriter

OnText = Callable[[str], None]
"""Called in the engine's thread with each new piece of text; it must return quickly."""


class Engine(ABC):
    """A loaded model. All methods may be called from any thread."""

    # How many requests `generate` keeps in flight, so that the batches of the engine stay full.
    in_flight: int = 64

    # Writes the prompts of the model; None where a server does it. It tells what the chat template can do.
    prompts: PromptWriter | None = None

    @abstractmethod
    def submit(self, request: Request, on_text: OnText | None = None) -> Future[Completion]:
        """Queue a request and return the future of its completion.

        The future never raises for a failed request: the completion has the error. Cancelling the future cancels
        the request, also while it runs.

        Args:
            request: What to generate.
            on_text: Receives the text piece by piece as it comes. Its pieces together are the text of the completion.
        """

    @abstractmethod
    def close(self) -> None:
        """End the engine and free its memory. Requests that are not done end as cancelled."""

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""

    @property
    @abstractmethod
    def context_length(self) -> int | None:
        """Number of tokens that prompt and answer may have together, or None where it is not known."""

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
                future = take_next(finished)
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
            while (piece := take_next(pieces)) is not None:
                yield piece
        finally:
            future.cancel()
        return checked(future.result())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checked(completion: Completion) -> Completion:
    """Return a completion that is one.

    Raises:
        GenerationError: With the message of the completion's error, if it has one.
    """
    if completion.error is not None:
        raise GenerationError(completion.error, error_code=completion.error_code, request_id=completion.request_id)
    return completion
