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
from functools import partial
from typing import Any, TypeVar

from prefect.logging import get_logger

from prefect_huggingface.blocks import InferenceEndpoint
from prefect_huggingface.tasks.engines.base import Engine, OnText, RequestError
from prefect_huggingface.tasks.engines.endpoint_client import EndpointClient
from prefect_huggingface.tasks.engines.endpoint_retry import Circuit, RetryPolicy
from prefect_huggingface.tasks.engines.inputs import resolve_options
from prefect_huggingface.tasks.engines.reasoning import FORMATS, find_reasoning_format
from prefect_huggingface.tasks.engines.request_state import RequestState
from prefect_huggingface.tasks.engines.structured import check_format
from prefect_huggingface.tasks.engines.worker import CLOSED
from prefect_huggingface.tasks.errors import EngineError
from prefect_huggingface.tasks.records import Completion, Request
from prefect_huggingface.tasks.run_logs import redact_client_logs

T = TypeVar("T")
logger = get_logger(__name__)


class EndpointEngine(Engine):
    """Engine whose model is served elsewhere.

    Nothing is asked of the endpoint before the first request, so that an endpoint which is asleep is no error.
    """

    def __init__(self, endpoint: InferenceEndpoint) -> None:
        redact_client_logs()
        self.endpoint = endpoint
        # While some requests wait for their next attempt, others use their slots.
        self.in_flight = 2 * endpoint.max_concurrency
        self._client = EndpointClient(endpoint)
        self._circuit = Circuit(endpoint)
        self._slots = asyncio.Semaphore(endpoint.max_concurrency)
        # The loop itself keeps weak references only.
        self._active_requests: dict[RequestState, asyncio.Task[None]] = {}
        self._lock = threading.RLock()  # the garbage collector may close an engine in any thread
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()

    def submit(
        self, request: Request, on_text: OnText | None = None, on_reasoning: OnText | None = None
    ) -> Future[Completion]:
        """Send a request as soon as there is a slot for it, and return the future of its completion."""
        state = RequestState(request, on_text, on_reasoning)
        # What came of a stream before the connection broke may come differently from the next attempt.
        state.restart_error = "unavailable"
        # With the context of the caller, what is logged about the request belongs to the caller's run.
        context = contextvars.copy_context()
        if not self._call(self._start, state, context):
            state.fail("engine_error" if self.failure else "cancelled", self.failure or CLOSED)
            state.complete()
        return state.future

    def close(self) -> None:
        """End the engine and its connections. Requests that are not done end as cancelled."""
        self.request_close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def request_close(self) -> None:
        """Have the engine close as soon as it can."""
        self._call(self._loop.stop, closes=True)

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens, as the server counts them.

        Raises:
            EngineError: If the server does not count tokens, or cannot be reached.
        """
        return self._result_of(self._client.count_tokens(text))

    @property
    def context_length(self) -> int | None:
        """Number of tokens that prompt and answer may have together, or None where the server does not say."""
        try:
            return self._result_of(self._client.find_server()).context_length
        except EngineError:
            return None

    def check_integrity(self) -> None:
        """Check that nothing of a request is left while nobody asks. For tests.

        Raises:
            AssertionError: With what is left over.
        """
        open_requests = [state for state in list(self._active_requests) if state.future.done()]
        if open_requests:
            raise AssertionError(f"The engine still holds {len(open_requests)} requests that are done.")

    def _call(self, call: Any, *arguments: Any, closes: bool = False) -> bool:
        """Call something in the thread of the engine, unless it is closed, and return whether it will be called."""
        if self.failure is not None:
            return False  # after a fork there is no thread, and the lock may be held for ever
        with self._lock:
            if self._closed:
                return False
            self._closed = closes
            self._loop.call_soon_threadsafe(call, *arguments)
        return True

    def _result_of(self, question: Coroutine[Any, Any, T]) -> T:
        future: Future[T] | None = None
        if self.failure is None:
            with self._lock:
                if not self._closed:
                    future = asyncio.run_coroutine_threadsafe(question, self._loop)
        if future is None:
            question.close()
            raise EngineError(f"The engine of {self.endpoint.base_url!r} is closed. Load it again.")
        try:
            return future.result()
        except RequestError as exc:
            raise EngineError(str(exc), error_code=exc.code) from None
        except CancelledError:
            raise EngineError(CLOSED) from None
        except Exception as exc:  # its text may hold the token
            raise EngineError(f"{self.endpoint.base_url!r} answers oddly ({type(exc).__name__}). Check it.") from None

    def _start(self, state: RequestState, context: contextvars.Context) -> None:
        task = self._loop.create_task(self._serve(state), context=context)
        self._active_requests[state] = task
        task.add_done_callback(lambda _: self._retire(state))
        state.future.add_done_callback(lambda future: self._call(task.cancel) if future.cancelled() else None)

    def _retire(self, state: RequestState) -> None:
        """Complete a request whose task has ended, also before its first step, when none of its code ran."""
        del self._active_requests[state]
        if not state.is_done:
            state.fail("cancelled", CLOSED)
        state.complete()

    async def _serve(self, state: RequestState) -> None:
        """Bring a request to its end, whatever happens."""
        try:
            await self._generate(state)
        except RequestError as exc:
            if exc.code == "too_long" and state.options.context_overflow == "skip":
                state.sequences, state.echo = [], ""
                state.skip(0)
            else:
                state.fail(exc.code, str(exc))
        except Exception as exc:
            # The exception of a library may hold the token, so that only its kind is told.
            logger.warning("A request to %s failed in an unknown way: %s", self.endpoint.base_url, type(exc).__name__)
            state.fail("engine_error", f"The request failed: {type(exc).__name__}. Try again.")

    async def _generate(self, state: RequestState) -> None:
        options = resolve_options(self.endpoint.options, state.request)
        if options.response_format is not None:
            check_format(options.response_format)
        # The server applies the template, so that its reasoning can be told by the tags of most models only.
        reasoning = None if state.request.chat_template == "never" else FORMATS[0]
        if options.reasoning_tags is not None:
            reasoning = find_reasoning_format((), tags=options.reasoning_tags)
        echo = (state.request.prompt or "") if options.echo else ""
        state.begin(options, (), None, echo=echo, reasoning=reasoning)
        if state.is_done:
            return
        try:
            seconds = options.deadline_seconds
            async with asyncio.timeout(None if seconds is None else seconds - state.seconds):
                await RetryPolicy(self.endpoint, self._circuit).call_with_retry(partial(self._attempt, state))
        except TimeoutError:
            state.end("deadline")

    async def _attempt(self, state: RequestState) -> None:
        options = state.options
        # Piece by piece, silence is no long answer but a server that is gone, and with a deadline, what came until then
        # is the answer. Not every server streams log probabilities.
        listens = state.on_text is not None or state.on_reasoning is not None
        streamed = options.n == 1 and (listens or options.deadline_seconds is not None or not options.logprobs)
        while True:
            await self._circuit.ready()
            async with self._slots:
                if not self._circuit.can_admit:
                    continue
                async with self._circuit.admit():
                    state.restart()
                    return await self._client.ask(state, streamed)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*asyncio.all_tasks(self._loop), return_exceptions=True))
        self._loop.run_until_complete(self._client.close())
        self._loop.close()
