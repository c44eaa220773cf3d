"""The engine of a warm model: requests go to another process, which keeps the model loaded, and completions come back.

Requests that come within some milliseconds travel together. Text comes in one piece, at the end.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from prefect.context import SettingsContext, get_settings_context
from prefect.logging import get_logger

from prefect_huggingface.blocks import WarmModel
from prefect_huggingface.tasks.engines.answers import Submission
from prefect_huggingface.tasks.engines.failures import RequestError, refused
from prefect_huggingface.tasks.engines.prompts import resolve_options
from prefect_huggingface.tasks.engines.protocol import Engine, OnText
from prefect_huggingface.tasks.engines.warm.calls import WarmCall, await_worker
from prefect_huggingface.tasks.engines.warm.messages import pack_request, unpack_completion
from prefect_huggingface.tasks.engines.warm.workers import Unwanted, WarmFailure
from prefect_huggingface.tasks.errors import EngineError
from prefect_huggingface.tasks.records import Completion, Request
from prefect_huggingface.tasks.waiting import take_next

logger = get_logger(__name__)

GATHER_SECONDS = 0.005
BATCHES_AT_ONCE = 2
EXIT_SECONDS = 5.0


class WarmEngine(Engine):
    """Engine whose model is loaded in a warm worker. Its threads live no longer than the requests of their callers."""

    def __init__(self, warm: WarmModel) -> None:
        self.warm = warm
        self.in_flight = BATCHES_AT_ONCE * warm.max_requests
        # The threads have the settings of the one who loads the engine, but not its run: nothing of it is to travel.
        self._settings = get_settings_context()
        self._inbox: queue.SimpleQueue[Submission] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._gathering = False
        self._closed = threading.Event()

    def submit(self, request: Request, on_text: OnText | None = None) -> Future[Completion]:
        """Queue a request and return the future of its completion."""
        try:
            options = resolve_options(self.warm.options, request)
        except RequestError as exc:
            return refused(request, exc)
        submission = Submission(replace(request, options=options), Future(), on_text, closed=self._closed)
        with self._lock:
            self._inbox.put(submission)
            if not self._gathering:
                self._gathering = True
                threading.Thread(target=self._gather, name="warm-requests", daemon=True).start()
        return submission.future

    def close(self) -> None:
        """End the engine. Requests that are not done end as cancelled; the worker keeps the model."""
        self._closed.set()

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens, as the model of the worker counts them.

        Raises:
            EngineError: If the worker does not answer.
        """
        return int(self._measure([text])["tokens"][0])

    @property
    def context_length(self) -> int | None:
        """Number of tokens that prompt and answer may have together, or None where it is not known.

        Raises:
            EngineError: If the worker does not answer.
        """
        length: int | None = self._measure([])["context_length"]
        return length

    def _measure(self, texts: list[str]) -> Any:
        end = time.monotonic() + self.warm.timeout_seconds
        call = WarmCall(self.warm, "measure_texts", {"model": self.warm.model, "texts": texts}, end, lambda: True)
        # As a future of another thread, so that nothing of the run of the caller travels with the call.
        outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def ask() -> None:
            try:
                outcome.put(self._run(call))
            except Exception as exc:
                outcome.put(exc)

        threading.Thread(target=ask, name="warm-question", daemon=True).start()
        answer = take_next(outcome)
        if isinstance(answer, WarmFailure):
            raise EngineError(str(answer), error_code=answer.code)
        if isinstance(answer, Exception):
            raise EngineError(f"The warm worker cannot be asked: {type(answer).__name__}: {answer}. Try again.")
        return answer

    def _gather(self) -> None:
        """Send what is submitted in batches, until there is no more."""
        while batch := self._next_batch():
            thread = threading.Thread(target=self._complete, args=(batch,), name="warm-batch", daemon=True)
            _calls.add(thread)
            thread.start()

    def _next_batch(self) -> list[Submission]:
        batch: list[Submission] = []
        until = time.monotonic() + GATHER_SECONDS
        while len(batch) < self.warm.max_requests:
            try:
                batch.append(take_next(self._inbox, max(until - time.monotonic(), 0.0)))
            except queue.Empty:
                break
        with self._lock:
            if not batch and self._inbox.empty():
                self._gathering = False
                return []
        return batch or self._next_batch()

    def _complete(self, batch: Sequence[Submission]) -> None:
        """Complete submissions, whatever happens."""
        arguments = {"model": self.warm.model, "requests": [pack_request(each.request) for each in batch]}
        end = time.monotonic() + self.warm.timeout_seconds

        def is_wanted() -> bool:
            return any(each.must_end is None for each in batch)

        try:
            records = self._run(WarmCall(self.warm, "answer_requests", arguments, end, is_wanted))
            for submission, record in zip(batch, records, strict=True):
                _settle(submission, unpack_completion(record, submission.request, submission.seconds))
        except Unwanted:
            _fail_all(batch, WarmFailure("cancelled", "The engine was closed before the request was done. Try again."))
        except WarmFailure as failure:
            _fail_all(batch, failure)
        except Exception as exc:
            logger.warning("The call of a warm worker failed.", exc_info=True)
            _fail_all(batch, WarmFailure("engine_error", f"The call failed: {type(exc).__name__}: {exc}. Try again."))

    def _run(self, call: WarmCall) -> Any:
        with SettingsContext(profile=self._settings.profile, settings=self._settings.settings):
            return call.run()


def _settle(submission: Submission, completion: Completion) -> None:
    if submission.on_text is not None and completion.text and not submission.future.cancelled():
        try:
            submission.on_text(completion.text)
        except Exception as exc:
            submission.fail("engine_error", f"`on_text` failed: {exc}. Correct it.")
            return
    submission.complete(completion)


def _fail_all(batch: Sequence[Submission], failure: WarmFailure) -> None:
    for submission in batch:
        if not submission.future.done():
            submission.fail(failure.code, str(failure))


_lock = threading.Lock()
_engines: dict[str, WarmEngine] = {}
_calls: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def load_warm(warm: WarmModel) -> Engine:
    """Return the engine of a warm model, after it is sure that a worker is there or comes in time.

    Raises:
        EngineError: If there is no worker, or no server that knows.
    """
    try:
        await_worker(warm)
    except WarmFailure as failure:
        raise EngineError(str(failure), error_code=failure.code) from None
    key = f"{get_settings_context().settings.api.url} {warm.model_dump_json()}"
    with _lock:
        engine = _engines.get(key)
        if engine is None:
            engine = _engines[key] = WarmEngine(warm)
    return engine


def _forget_after_fork() -> None:
    # The threads of the engines do not live in the child, and a lock may be held by a thread that is gone.
    global _lock
    _lock = threading.Lock()
    _engines.clear()


def _end_calls_at_exit() -> None:
    # The worker has to hear that nobody waits any more, or it would go on to the end.
    for engine in _engines.values():
        engine.close()
    end = time.monotonic() + EXIT_SECONDS
    for thread in list(_calls):
        thread.join(max(0.0, end - time.monotonic()))


atexit.register(_end_calls_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
