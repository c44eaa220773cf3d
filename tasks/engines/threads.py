"""An engine whose model is touched by one thread of its own, whoever asks."""

from __future__ import annotations

import queue
import threading
from abc import abstractmethod
from concurrent.futures import Future

from prefect.logging import get_logger

from prefect_huggingface.tasks.engines.answers import Submission
from prefect_huggingface.tasks.engines.failures import RequestError
from prefect_huggingface.tasks.engines.protocol import Engine, OnText
from prefect_huggingface.tasks.records import Completion, Request
from prefect_huggingface.tasks.waiting import join_thread

logger = get_logger(__name__)


class ThreadedEngine(Engine):
    """Queue in front of one thread.

    A subclass says what it does with a submission (`_accept`), what one turn of its work is (`_turn`), and what is
    under way (`_under_way`). All three run in the thread of the engine only.
    """

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Submission | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()

    @abstractmethod
    def _accept(self, submission: Submission) -> None:
        """Take in a request. What it raises is the error of this request alone."""

    @abstractmethod
    def _turn(self) -> None:
        """Do the next part of the work. What it raises ends all that is under way."""

    @abstractmethod
    def _under_way(self) -> list[Submission]:
        """Return the submissions that were taken in and are not completed."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop all that is under way; the submissions are completed already."""

    @abstractmethod
    def _free(self) -> None:
        """Let go of the model."""

    def submit(self, request: Request, on_text: OnText | None = None) -> Future[Completion]:
        """Queue a request and return the future of its completion."""
        submission = Submission(request, Future(), on_text, closed=self._closed)
        with self._lock:
            if not self._closed.is_set():
                self._inbox.put(submission)
                return submission.future
        submission.cancel()
        return submission.future

    def close(self) -> None:
        """End the engine and free its memory. Requests that are not done end as cancelled."""
        with self._lock:
            if not self._closed.is_set():
                self._closed.set()
                self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            join_thread(self._thread)

    def _run(self) -> None:
        while self._take_in():
            try:
                self._turn()
            except Exception as exc:
                logger.warning("The engine failed and goes on with the next requests.", exc_info=True)
                self._end_all(
                    f"The engine failed: {type(exc).__name__}: {exc}. Try again, with fewer requests at once."
                )
        self._end_all(None)
        self._free()

    def _take_in(self) -> bool:
        """Accept what is queued; wait for it where nothing is under way. Tell whether to go on."""
        while True:
            try:
                submission = self._inbox.get(block=not self._under_way())
            except queue.Empty:
                return True
            if submission is None or self._closed.is_set():
                if submission is not None:
                    submission.cancel()
                return False
            self._accept_safely(submission)

    def _accept_safely(self, submission: Submission) -> None:
        if submission.future.cancelled():
            return
        try:
            self._accept(submission)
        except RequestError as exc:
            submission.fail(exc.code, str(exc), prompt_tokens=exc.prompt_tokens)
        except Exception as exc:
            submission.fail("engine_error", f"The request failed: {type(exc).__name__}: {exc}. Check its prompt.")

    def _end_all(self, error: str | None) -> None:
        submissions = self._under_way()
        self._forget()
        for submission in submissions:
            if error is None:
                submission.cancel()
            else:
                submission.fail("engine_error", error)
        while error is None:
            try:
                waiting = self._inbox.get_nowait()
            except queue.Empty:
                return
            if waiting is not None:
                waiting.cancel()
