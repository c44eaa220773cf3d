"""How long an endpoint is waited for: a circuit breaker that all requests share, and the waits between attempts."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prefect_huggingface.blocks import InferenceEndpoint
from prefect_huggingface.tasks.engines.endpoints.failures import EndpointFailure
from prefect_huggingface.tasks.run_logs import run_log

FAILURES_TO_OPEN = 5
FIRST_WAIT_SECONDS = 0.25
FIRST_PROBE_SECONDS = 0.1
LONGEST_PROBE_SECONDS = 15.0
# The longer an outage lasts, the rarer the probes, so that the way back is late by this share of it at most.
PROBE_SHARE = 0.1
LOG_EVERY_SECONDS = 15.0


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
    def _limit(self) -> float:
        asleep = self._last_failure is not None and self._last_failure.outlook == "asleep"
        return self._endpoint.wake_timeout_seconds if asleep else self._endpoint.outage_timeout_seconds

    def check(self) -> None:
        """Raise the last failure where the endpoint has been away for too long.

        Raises:
            EndpointFailure: With how long it was waited for.
        """
        failure = self._last_failure
        if failure is not None and self.down_seconds > self._limit:
            raise EndpointFailure(
                failure.code, f"{failure.message} It was waited for {self.down_seconds:.0f} s.", "final"
            ) from None

    @property
    def admits(self) -> bool:
        """Whether a request may be sent now."""
        return not self.is_open or (not self._probing and time.monotonic() >= self._next_probe)

    async def ready(self) -> None:
        """Wait until a request may be sent.

        Raises:
            EndpointFailure: If the endpoint has been away for too long.
        """
        while not self.admits:
            self.check()
            await _wait_for(self._changed, None if self._probing else self._next_probe - time.monotonic())

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[None]:
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
                self._notify()

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
                self._endpoint.base_url, self.down_seconds, self._limit, failure.message,
            )  # fmt: skip

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def _wait_for(event: asyncio.Event, seconds: float | None) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


def wait_after(failure: EndpointFailure, failures: int, endpoint: InferenceEndpoint) -> float:
    """Return the seconds to wait before the next attempt: longer each time, and as long as the server asks.

    Raises:
        EndpointFailure: If the server asks for more than the endpoint allows, and is not just away.
    """
    asked = failure.wait_seconds or 0.0
    if asked > endpoint.max_retry_wait_seconds and not failure.is_outage:
        raise EndpointFailure(
            failure.code,
            f"{failure.message} It asks to wait {asked:.0f} s, more than `max_retry_wait_seconds` "
            f"({endpoint.max_retry_wait_seconds:g}).",
        ) from None
    growing = FIRST_WAIT_SECONDS * 2.0 ** min(failures - 1, 16) * random.uniform(0.75, 1.25)
    return min(max(asked, growing), endpoint.max_retry_wait_seconds)
