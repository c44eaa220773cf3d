"""Failures of an endpoint, and what is done about them: retries, backoff, and a circuit breaker for all requests.

A failure says, in words that name the remedy and never hold a secret, what it means for the next attempt: nothing can
be done (`final`), the same request may work later (`transient`), or the endpoint itself is not there (`down`,
`asleep`), which concerns all requests alike.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential, wait_random

from prefect_huggingface.blocks import InferenceEndpoint
from prefect_huggingface.tasks.engines.base import RequestError
from prefect_huggingface.tasks.hub_errors import announced_wait
from prefect_huggingface.tasks.records import ErrorCode
from prefect_huggingface.tasks.run_logs import redact, run_log

MAX_WORDS = 300
TOO_LONG = re.compile(
    r"inputs.{0,30}max_new_tokens|max_total_tokens|max_input|context[ _](?:length|window)|fit the context|too long"
    r"|too many (?:input )?tokens|longer than|max_(?:completion_)?tokens.{0,40}(?:is|are) too large",
    re.IGNORECASE,
)
TOO_LONG_CODE = re.compile("context_length_exceeded|out_of_cache")
# What the model server of this library says of a model that will not load, however often it is asked for.
UNLOADABLE_CODE = "model_unavailable"
TRANSIENT_STATUSES = (408, 424, 425, 429, 500)

Kind = Literal["final", "transient", "down", "asleep"]
FAILURES_TO_OPEN = 5
BACKOFF = wait_exponential(multiplier=0.25) + wait_random(0, 0.1)
FIRST_PROBE_SECONDS = 0.1
LONGEST_PROBE_SECONDS = 15.0
# The longer an outage lasts, the rarer the probes, so that the way back is late by this share of it at most.
PROBE_SHARE = 0.1
LOG_EVERY_SECONDS = 15.0


class EndpointFailure(RequestError):
    """One attempt that failed.

    Attributes:
        kind: What it means for the next attempt.
        wait_seconds: How long the server asks to wait, or None.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        kind: Kind = "final",
        wait_seconds: float | None = None,
    ) -> None:
        super().__init__(code, message)
        self.kind, self.wait_seconds = kind, wait_seconds

    @property
    def is_outage(self) -> bool:
        """Whether the endpoint itself is not there, so that other requests would fail as well."""
        return self.kind in ("down", "asleep")


@dataclass(slots=True)
class HttpTrace:
    """One attempt as it was seen on the wire.

    Attributes:
        status: Status of the last response, or None where there was none.
        headers: Headers of the last response.
        redirected_to: Origin that the request was redirected to, where that is another one.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    redirected_to: str | None = None

    @property
    def content_type(self) -> str:
        """Content type of the response, without its parameters."""
        return self.headers.get("content-type", "").split(";")[0].strip().lower()


class Circuit:
    """Whether the endpoint is there, as the requests find it.

    After some failures in a row that are not a request's own, the circuit is open: one request at a time goes on
    trying and the others wait for it. When that takes longer than the endpoint allows, the requests fail at once, but
    for a rare probe, until one succeeds.

    Used by the coroutines of one event loop.
    """

    def __init__(self, endpoint: InferenceEndpoint) -> None:
        self._endpoint = endpoint
        self._failures = 0
        self._down_since: float | None = None
        self._last_failure: EndpointFailure | None = None
        self._opened_at = 0.0
        self._next_probe = 0.0
        self._next_log = 0.0
        self._probing = False
        self._changed = asyncio.Event()
        self.successes = 0

    @property
    def is_open(self) -> bool:
        """Whether requests are held back."""
        return self._failures >= FAILURES_TO_OPEN

    @property
    def down_seconds(self) -> float:
        """Seconds since the first of the last failures in a row, 0 where the last attempt found the endpoint."""
        return 0.0 if self._down_since is None else time.monotonic() - self._down_since

    @property
    def can_admit(self) -> bool:
        """Whether a request may be sent now."""
        return not self.is_open or (not self._probing and time.monotonic() >= self._next_probe)

    @property
    def _limit(self) -> float:
        asleep = self._last_failure is not None and self._last_failure.kind == "asleep"
        return self._endpoint.wake_timeout_seconds if asleep else self._endpoint.outage_timeout_seconds

    def check(self) -> None:
        """Raise the last failure where the endpoint has been away for too long, with how long it was waited for."""
        failure = self._last_failure
        if failure is not None and self.down_seconds > self._limit:
            raise EndpointFailure(failure.code, f"{failure} It was waited for {self.down_seconds:.0f} s.")

    async def ready(self) -> None:
        """Wait until a request may be sent, or raise where the endpoint has been away for too long."""
        while not self.can_admit:
            self.check()
            try:
                async with asyncio.timeout(None if self._probing else self._next_probe - time.monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                continue

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[None]:
        """Learn from the outcome of the attempt inside."""
        probe, began = self.is_open, time.monotonic()
        self._probing = self._probing or probe
        try:
            yield
        except EndpointFailure as failure:
            self._learn(failure, began)
            raise
        else:
            self._learn(None, began)
        finally:
            if probe:
                self._probing = False
                self._changed.set()
                self._changed = asyncio.Event()

    def _learn(self, failure: EndpointFailure | None, began: float) -> None:
        if failure is not None and failure.is_outage:
            self._count(failure)
        elif not self.is_open or began > self._opened_at:
            # Any answer shows that the server is there, but for one to a request from before it went away.
            if self.is_open:
                run_log().info("%s is back after %.0f s.", self._endpoint.base_url, self.down_seconds)
            self._failures, self._down_since, self._last_failure = 0, None, None
            self.successes += 1

    def _count(self, failure: EndpointFailure) -> None:
        now = time.monotonic()
        self._failures += 1
        self._last_failure = failure
        self._down_since = self._down_since or now
        pause = min(max(FIRST_PROBE_SECONDS, PROBE_SHARE * self.down_seconds), LONGEST_PROBE_SECONDS)
        self._next_probe = now + max(pause, min(failure.wait_seconds or 0.0, self._endpoint.max_retry_wait_seconds))
        if self._failures == FAILURES_TO_OPEN:
            self._opened_at = self._next_log = now
        if self.is_open and now >= self._next_log:
            self._next_log = now + LOG_EVERY_SECONDS
            run_log().warning(
                "Waiting for %s for %.0f s of at most %.0f s: %s",
                self._endpoint.base_url, self.down_seconds, self._limit, failure,
            )  # fmt: skip


class RetryPolicy:
    """When one request is sent again. An outage is waited for; what is the request's own fault counts as an attempt."""

    def __init__(self, endpoint: InferenceEndpoint, circuit: Circuit) -> None:
        self._endpoint, self._circuit = endpoint, circuit
        self._successes = circuit.successes
        self._own_failures = 0

    async def call_with_retry(self, attempt: Callable[[], Awaitable[None]]) -> None:
        """Make attempts until one succeeds.

        Raises:
            EndpointFailure: If the endpoint has been away, or has refused the request, for too long.
        """
        may_pass = retry_if_exception(lambda error: isinstance(error, EndpointFailure) and error.kind != "final")
        await AsyncRetrying(sleep=asyncio.sleep, retry=may_pass, wait=self._backoff, reraise=True)(attempt)

    def _backoff(self, call: RetryCallState) -> float:
        """Return the seconds to wait before the next attempt: longer each time, and as long as the server asks."""
        failure = call.outcome.exception() if call.outcome is not None else None
        assert isinstance(failure, EndpointFailure)
        # While the endpoint answers nobody, the failure is not this request's own.
        self._own_failures += not failure.is_outage or self._circuit.successes > self._successes
        self._successes = self._circuit.successes
        self._circuit.check()
        if self._own_failures >= self._endpoint.max_attempts:
            text = f"{failure} It was tried {call.attempt_number} times."
            raise EndpointFailure(failure.code, text) from None
        if failure.is_outage and self._circuit.is_open:
            return 0.0
        asked, longest = failure.wait_seconds or 0.0, self._endpoint.max_retry_wait_seconds
        if asked > longest and not failure.is_outage:
            text = f"It asks to wait {asked:.0f} s, more than `max_retry_wait_seconds` ({longest:g})."
            raise EndpointFailure(failure.code, f"{failure} {text}") from None
        return min(max(asked, BACKOFF(call)), longest)


def explain(exc: Exception, trace: HttpTrace, endpoint: InferenceEndpoint) -> EndpointFailure:
    """Return the failure that an exception means. It keeps no reference to the exception, which may hold a secret."""
    if isinstance(exc, httpx.TransportError | httpx.TooManyRedirects):
        return _explain_transport(exc, trace, endpoint)
    return not_an_endpoint(endpoint, trace, f"an answer that cannot be read ({type(exc).__name__})")


def explain_status(status: int, body: str, trace: HttpTrace, endpoint: InferenceEndpoint) -> EndpointFailure:
    """Return the failure that a status means, and what the server says with it."""
    words = _words_of(body)
    said = f" ({_clean(words, endpoint)})" if words else ""
    place = repr(endpoint.base_url)
    wait = announced_wait(trace.headers)
    if status in (401, 403):
        return EndpointFailure("unauthorized", _explain_refusal(status, said, trace, endpoint))
    if status == 404:
        model = f" or no model {endpoint.model_name!r}" if endpoint.model_name else ""
        text = f"{place} has no such route{model}{said}. Check `url`, `model_id` and `protocol` of the endpoint."
        return EndpointFailure("not_found", text)
    if status in (429, 408, 425):
        text = f"{place} limits the rate of requests{said}. Lower `max_concurrency`, or try again later."
        return EndpointFailure("rate_limited", text, "transient", wait)
    if status in TRANSIENT_STATUSES:
        lasts = _code_of(body) == UNLOADABLE_CODE
        passing = f"{place} failed with status {status}{said}. Try again; look at the server's log if it goes on."
        text = f"{place} cannot load its model{said}. Look at the server's log." if lasts else passing
        return EndpointFailure("engine_error", text, "final" if lasts else "transient", wait)
    if status >= 500 and status != 501:
        text = f"{place} is not ready, status {status}{said}. Start it, or raise `wake_timeout_seconds`."
        return EndpointFailure("unavailable", text, "asleep" if status == 503 else "down", wait)
    if status == 413 or TOO_LONG_CODE.search(body) or TOO_LONG.search(words):
        text = f"The prompt with its new tokens is too long for {place}{said}. Shorten it, or lower `max_new_tokens`."
        return EndpointFailure("too_long", text)
    if status in (400, 422):
        return EndpointFailure("invalid_option", f"{place} refuses the request{said}. Correct its options.")
    text = f"{place} does not answer as an inference server does, status {status}{said}. Check `url` and `protocol`."
    return EndpointFailure("bad_answer", text)


def _explain_refusal(status: int, said: str, trace: HttpTrace, endpoint: InferenceEndpoint) -> str:
    place = repr(endpoint.base_url)
    if trace.redirected_to is not None:
        return (
            f"{place} redirects to {trace.redirected_to!r}, which is another host and gets no token{said}. "
            "Put the final address into `url`."
        )
    if endpoint.get_token() is None:
        return f"{place} asks for a token and none is configured{said}. Put one into the endpoint's `credentials`."
    what = "does not accept the token" if status == 401 else "gives this token no access"
    return f"{place} {what}{said}. Put a token with access into the endpoint's `credentials`."


def _explain_transport(exc: Exception, trace: HttpTrace, endpoint: InferenceEndpoint) -> EndpointFailure:
    place = repr(endpoint.base_url)
    chain = list(_chain(exc))
    if any(isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME for cause in chain):
        return EndpointFailure("unavailable", f"The host of {place} does not exist. Correct `url`.")
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in chain):
        text = f"The certificate of {place} cannot be verified. Correct `url`, or trust its authority (SSL_CERT_FILE)."
        return EndpointFailure("unavailable", text)
    if any(getattr(cause, "reason", None) == "WRONG_VERSION_NUMBER" for cause in chain):
        return EndpointFailure("unavailable", f"{place} does not speak https. Correct the scheme of `url`.")
    if isinstance(exc, httpx.TooManyRedirects):
        return EndpointFailure("bad_answer", f"{place} redirects in circles. Check `url`.")
    if trace.status is None and isinstance(exc, httpx.RemoteProtocolError) and "disconnected" not in str(exc):
        return not_an_endpoint(endpoint, trace, "an answer that is not HTTP")
    if isinstance(exc, httpx.TimeoutException) and not isinstance(exc, httpx.ConnectTimeout):
        text = f"{place} was silent for {endpoint.timeout_seconds:g} s. Raise `timeout_seconds`, or look at the server."
        return EndpointFailure("unavailable", text, "down" if trace.status is None else "transient")
    if trace.status is not None:
        text = f"{place} ended the connection in the middle of an answer. Try again."
        return EndpointFailure("unavailable", text, "transient")
    text = f"{place} cannot be reached ({type(exc).__name__}). Start the server, or correct `url`."
    return EndpointFailure("unavailable", text, "down")


def not_an_endpoint(endpoint: InferenceEndpoint, trace: HttpTrace, what: str) -> EndpointFailure:
    """Return the failure for an answer that an inference server does not give."""
    via = f", after a redirection to {trace.redirected_to!r}" if trace.redirected_to else ""
    text = f"{endpoint.base_url!r} gives {what}{via}, not that of an inference server. Check `url` and `protocol`."
    return EndpointFailure("bad_answer", text)


def _words_of(body: str) -> str:
    """Return what a server says in the body of a refusal, as JSON or as a short plain text."""
    try:
        value = json.loads(body)
    except ValueError:
        return "" if body.lstrip().startswith("<") else body.strip()
    while isinstance(value, dict):
        value = next((value[name] for name in ("error", "message", "detail") if value.get(name)), "")
    return value if isinstance(value, str) else json.dumps(value)


def _code_of(body: str) -> Any:
    """Return the code that OpenAI's servers give an error, or None."""
    try:
        return json.loads(body)["error"]["code"]
    except (ValueError, LookupError, TypeError):
        return None


def _clean(words: str, endpoint: InferenceEndpoint) -> str:
    """Return words of a server on one line, short, and without anything secret that it may have repeated."""
    for secret in (endpoint.get_token(), *endpoint.get_headers().values()):
        if secret:
            words = words.replace(secret, "...")
    words = " ".join(redact(words).split())
    return words if len(words) <= MAX_WORDS else words[:MAX_WORDS] + "..."


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__
