"""An engine whose model is touched by one thread of its own, whoever asks.

The thread takes requests from its inbox, lets the backend do one step for all that are active, and completes those that
are done. This is the only place where a request is completed, so that no future stays open: a request fails alone, a
step fails all that are active, and what cannot be recovered fails the engine, with every present and future request.
"""

from __future__ import annotations

import queue
import threading
from abc import abstractmethod
from concurrent.futures import Future

from prefect.logging import get_logger

from prefect_huggingface.tasks.engines.base import Engine, OnText
from prefect_huggingface.tasks.engines.inputs import InputProcessor
from prefect_huggingface.tasks.engines.request_state import RequestState
from prefect_huggingface.tasks.errors import EngineError
from prefect_huggingface.tasks.records import Completion, Request

logger = get_logger(__name__)

CLOSED = "The engine was closed before the request was done. Load the engine again."


class LocalEngine(Engine):
    """An engine whose prompts are made on this machine."""

    inputs: InputProcessor

    def __init__(self, inputs: InputProcessor) -> None:
        self.inputs = inputs

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens."""
        return len(self.inputs.tokenizer.encode(text, add_special_tokens=False))

    @property
    def context_length(self) -> int | None:
        """Number of tokens that prompt and answer may have together, or None where it is not known."""
        return self.inputs.context_length

    def refuse(self, state: RequestState) -> None:
        """Complete a request that the engine, closed or failed, does not work on any more."""
        if self.failure is not None:
            state.fail("engine_error", self.failure)
        else:
            state.fail("cancelled", CLOSED)
        state.complete()


class EngineWorker(LocalEngine):
    """Inbox in front of one thread. A backend implements `add`, `remove`, `step`, `reset` and `release`.

    Attributes:
        active_requests: Requests that were taken in and are not completed, in the order of their submission. Only the
            thread of the engine changes it.
    """

    def __init__(self, inputs: InputProcessor) -> None:
        """Start the thread. Everything that the backend needs must be there already."""
        super().__init__(inputs)
        self.active_requests: dict[RequestState, None] = {}
        self._inbox: queue.SimpleQueue[RequestState | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closing = self._closed = False
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()

    @abstractmethod
    def add(self, state: RequestState) -> None:
        """Take in a request whose state has begun. What it raises is the error of this request alone."""

    @abstractmethod
    def remove(self, state: RequestState) -> None:
        """Take a request out, wherever it is, and let go of all that it holds. It may be gone already."""

    @abstractmethod
    def step(self) -> None:
        """Do the next part of the work, and give the sequences their tokens.

        What it raises fails all active requests; an `EngineError` fails the engine.
        """

    @abstractmethod
    def reset(self) -> None:
        """Become usable again after a failed step, when all requests are gone. What it raises fails the engine."""

    @abstractmethod
    def release(self) -> None:
        """Let go of the model."""

    def leftovers(self) -> list[str]:
        """Return what the backend still holds though no request is active. For tests."""
        return []

    def finished(self) -> None:
        """Called when requests were completed."""
        return

    def submit(
        self, request: Request, on_text: OnText | None = None, on_reasoning: OnText | None = None
    ) -> Future[Completion]:
        """Queue a request and return the future of its completion."""
        state = RequestState(request, on_text, on_reasoning)
        self.inputs.read_ahead(state, self._enqueue)
        return state.future

    def close(self) -> None:
        """End the engine and free its memory. Requests that are not done end as cancelled."""
        self.request_close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def request_close(self) -> None:
        """Have the engine close as soon as it can. It does not wait and takes no lock."""
        self._closing = True
        self._inbox.put(None)

    def check_integrity(self) -> None:
        """Check that an engine with no active request holds nothing of any request. For tests.

        Raises:
            AssertionError: With what is left over.
        """
        left = [] if self.active_requests else self.leftovers()
        if left:
            raise AssertionError(f"The engine is idle and still holds {', '.join(left)}.")

    def _enqueue(self, state: RequestState) -> None:
        with self._lock:
            if not self._closed:
                self._inbox.put(state)
                return
        self.refuse(state)

    def _run(self) -> None:
        try:
            while self._drain_inbox():
                self._abort_expired()
                self._advance()
        except BaseException as exc:
            logger.error("The engine failed and can be used no more.", exc_info=True)
            self.failure = f"The engine failed: {type(exc).__name__}: {exc} Load it again."
        finally:
            try:
                self._abort_all()
                self.inputs.close()
                self.release()
            finally:
                if self.on_close is not None:
                    self.on_close()

    def _drain_inbox(self) -> bool:
        """Accept what is queued; wait for it where nothing is active. Return whether to go on."""
        while True:
            try:
                state = self._inbox.get(block=not self.active_requests)
            except queue.Empty:
                return True
            if state is None:
                return False
            self._accept(state)

    def _accept(self, state: RequestState) -> None:
        if state.future.cancelled():
            return
        try:
            if not state.is_done:
                self.inputs.begin(state)
            if not state.is_done:
                self.active_requests[state] = None
                self.add(state)
        except Exception as exc:
            state.fail_with(exc, "The request failed", "Check its prompt.")
        if state.is_done:
            self._retire(state)

    def abort_if_due(self, state: RequestState) -> None:
        """End a request that was cancelled, is past its deadline, or belongs to an engine that closes.

        A backend whose steps are long calls it in between.
        """
        if self._closing:
            state.fail("cancelled", CLOSED)
        elif not state.is_done and (reason := state.abort_reason) is not None:
            state.end(reason)

    def _abort_expired(self) -> None:
        due = [state for state in self.active_requests if self._closing or state.abort_reason is not None]
        for state in due:
            self.abort_if_due(state)
            self._retire(state)

    def _advance(self) -> None:
        if not self.active_requests:
            return
        try:
            self.step()
        except EngineError:
            raise
        except Exception as exc:
            logger.warning("A step of the engine failed; it goes on with the next requests.", exc_info=True)
            error = f"The engine failed: {type(exc).__name__}: {exc}. Try again, with fewer requests at once."
            for state in list(self.active_requests):
                state.fail("engine_error", error)
                self._retire(state)
            self.reset()
            return
        done = [state for state in self.active_requests if state.is_done]
        for state in done:
            self._retire(state)
        if done:
            self.finished()

    def _retire(self, state: RequestState) -> None:
        """Take a request out and complete it."""
        try:
            if self.active_requests.pop(state, state) is None:
                self.remove(state)
        finally:
            state.complete()

    def _abort_all(self) -> None:
        """End all requests, those that are active and those that wait."""
        with self._lock:
            self._closed = True
        for state in list(self.active_requests):
            self.refuse(state)
        self.active_requests.clear()
        while True:
            try:
                waiting = self._inbox.get_nowait()
            except queue.Empty:
                return
            if waiting is not None:
                self.refuse(waiting)
