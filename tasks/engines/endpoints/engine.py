"""The engine of an endpoint: the same requests and completions as those of a local model, over the network.

Requests run side by side in the event loop of one thread, up to the concurrency of the block. One that fails for now is
sent again; while the endpoint is away, one request at a time tries it and the others wait.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Any, TypeVar

from prefect.logging import get_logger

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint
from prefect_huggingface.tasks.engines.answer_forms import check_form
from prefect_huggingface.tasks.engines.answers import Submission
from prefect_huggingface.tasks.engines.base import Engine, OnText
from prefect_huggingface.tasks.engines.endpoints.answers import EndpointAnswer
from prefect_huggingface.tasks.engines.endpoints.calls import make_call
from prefect_huggingface.tasks.engines.endpoints.failures import EndpointFailure
from prefect_huggingface.tasks.engines.endpoints.patience import Circuit, wait_after
from prefect_huggingface.tasks.engines.endpoints.service import EndpointService
from prefect_huggingface.tasks.engines.failures import RequestError, failed
from prefect_huggingface.tasks.engines.prompts import resolve_options
from prefect_huggingface.tasks.errors import EngineError
from prefect_huggingface.tasks.records import Completion, Request
from prefect_huggingface.tasks.storage.hub.redaction import redact_client_logs
from prefect_huggingface.tasks.waiting import join_thread, result_of

T = TypeVar("T")
logger = get_logger(__name__)


class EndpointEngine(Engine):
    """Engine whose model is served elsewhere.

    Nothing is asked of the endpoint before the first request, so that an endpoint which is asleep is no error.
    """

    def __init__(self, endpoint: InferenceEndpoint) -> None:
        redact_client_logs()
        self.endpoint = endpoint
        # While some requests wait for their next attempt, others use their places.
        self.in_flight = 2 * endpoint.max_concurrency
        self._service = EndpointService(endpoint)
        self._circuit = Circuit(endpoint)
        self._places = asyncio.Semaphore(endpoint.max_concurrency)
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()

    def submit(
        self, request: Request, on_text: OnText | None = None, on_reasoning: OnText | None = None
    ) -> Future[Completion]:
        """Send a request as soon as there is a place for it, and return the future of its completion."""
        submission = Submission(request, Future(), on_text)
        # With the context of the caller, what is logged about the request belongs to the caller's run.
        context = contextvars.copy_context()
        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(self._start, submission, context)
                return submission.future
        submission.complete(_cancelled(submission))
        return submission.future

    def close(self) -> None:
        """End the engine and its connections. Requests that are not done end as cancelled."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self._thread:
            join_thread(self._thread)

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens, as the server counts them.

        Raises:
            EngineError: If the server does not count tokens, or cannot be reached.
        """
        return self._wait_for(self._service.count_tokens(text))

    @property
    def context_length(self) -> int | None:
        """Number of tokens that prompt and answer may have together, or None where the server does not say."""
        try:
            return self._wait_for(self._service.look_up()).context_length
        except EngineError:
            return None

    def _wait_for(self, question: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._closed:
                question.close()
                raise EngineError(f"The engine of {self.endpoint.base_url!r} is closed. Load it again.")
            future = asyncio.run_coroutine_threadsafe(question, self._loop)
        try:
            return result_of(future)
        except EndpointFailure as failure:
            raise EngineError(failure.message, error_code=failure.code) from None
        except CancelledError:
            raise EngineError(f"The engine of {self.endpoint.base_url!r} was closed. Load it again.") from None

    def _start(self, submission: Submission, context: contextvars.Context) -> None:
        task = self._loop.create_task(self._serve(submission), context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        submission.future.add_done_callback(lambda future: self._end(task) if future.cancelled() else None)

    def _end(self, task: asyncio.Task[None]) -> None:
        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(task.cancel)

    async def _serve(self, submission: Submission) -> None:
        """Complete a submission, whatever happens."""
        request = submission.request
        try:
            completion = await self._complete(submission)
        except asyncio.CancelledError:
            completion = _cancelled(submission)
        except (RequestError, EndpointFailure) as exc:
            completion = failed(request, exc.code, str(exc))
        except Exception as exc:
            # The exception of a library may hold the token, so that only its kind is told.
            logger.warning("A request to %s failed in an unknown way: %s", self.endpoint.base_url, type(exc).__name__)
            completion = failed(request, "engine_error", f"The request failed: {type(exc).__name__}. Try again.")
        submission.complete(replace(completion, seconds=submission.seconds))

    async def _complete(self, submission: Submission) -> Completion:
        options = resolve_options(self.endpoint.options, submission.request)
        answer = EndpointAnswer(submission.request, options, submission.on_text)
        try:
            async with asyncio.timeout(_seconds_left(submission, options)):
                await self._insist(submission, options, answer)
        except TimeoutError:
            return answer.completion("deadline")
        except (RequestError, EndpointFailure) as exc:
            if exc.code == "too_long" and options.context_overflow == "skip":
                return Completion("", "skipped", request_id=submission.request.id)
            raise
        completion = answer.completion()
        if options.response_format is None:
            return completion
        return replace(completion, parsed=check_form(completion.text, options.response_format))

    async def _insist(self, submission: Submission, options: GenerationOptions, answer: EndpointAnswer) -> None:
        """Send a request until it is answered, as long as that makes sense."""
        tries = failures = 0
        successes = self._circuit.successes
        while True:
            answer.begin()
            try:
                return await self._attempt(submission, options, answer)
            except EndpointFailure as failure:
                if failure.outlook == "final":
                    raise
                tries += 1
                # While the endpoint answers nobody, the failure is not this request's own.
                if not failure.is_outage or self._circuit.successes > successes:
                    failures += 1
                successes = self._circuit.successes
                self._circuit.check()
                if failures >= self.endpoint.max_attempts:
                    raise EndpointFailure(failure.code, f"{failure.message} It was tried {tries} times.") from None
                if not (failure.is_outage and self._circuit.is_open):
                    await asyncio.sleep(wait_after(failure, tries, self.endpoint))

    async def _attempt(self, submission: Submission, options: GenerationOptions, answer: EndpointAnswer) -> None:
        # With a deadline, what came until then is the answer, so it has to come piece by piece.
        streamed = options.n == 1 and (submission.on_text is not None or options.deadline_seconds is not None)
        while True:
            await self._circuit.ready()
            async with self._places:
                if not self._circuit.admits:
                    continue
                async with self._circuit.watch():
                    server = await self._service.look_up()
                    call = make_call(submission.request, options, self.endpoint, server)
                    return await self._service.ask(call, answer, options, streamed)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*asyncio.all_tasks(self._loop), return_exceptions=True))
        self._loop.run_until_complete(self._service.close())
        self._loop.close()


def _seconds_left(submission: Submission, options: GenerationOptions) -> float | None:
    return None if options.deadline_seconds is None else options.deadline_seconds - submission.seconds


def _cancelled(submission: Submission) -> Completion:
    return Completion("", "cancelled", seconds=submission.seconds, request_id=submission.request.id)
