"""How long a download goes on trying: number of attempts, waits between them, a least rate, an early stop."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from prefect_huggingface.tasks.hub_errors import HubError
from prefect_huggingface.tasks.storage.hub.explanations import Subject, attempt

Result = TypeVar("Result")

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
LONGEST_OBEYED_WAIT_SECONDS = 120.0
"""A server that asks for a longer wait than this gets it from Prefect's retries, not from a sleeping download."""


LEAST_BYTES_PER_SECOND = 1024.0
"""A server that sends more slowly than this has stalled, although it sends something now and then."""


class DownloadStopped(BaseException):
    """Raised in the threads of a download that has failed elsewhere. It never leaves the download.

    It is no `Exception`, so that nothing takes it for a failure of the Hub.
    """


class Pace:
    """Watches that bytes come in at a least rate.

    Args:
        seconds: Length of the periods over which the rate is taken.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started = time.monotonic()
        self._bytes = 0

    def is_too_slow(self, size: int) -> bool:
        """Count bytes that came in, and tell whether they come too slowly."""
        self._bytes += size
        taken = time.monotonic() - self._started
        if taken < self.seconds:
            return False
        slow = self._bytes < LEAST_BYTES_PER_SECOND * taken
        self._started, self._bytes = time.monotonic(), 0
        return slow


class Patience:
    """The attempts at one thing.

    Args:
        attempts: How many attempts may fail in a row.
        stop: Set when there is no use in going on.
    """

    def __init__(self, attempts: int, stop: threading.Event) -> None:
        self.attempts = attempts
        self.stop = stop
        self.failures = 0

    def reset(self) -> None:
        """Begin to count anew, because an attempt brought something."""
        self.failures = 0

    def rest(self, problem: HubError) -> None:
        """Wait before the next attempt, as long as the server asks.

        Raises:
            HubError: The problem, if a further attempt is of no use.
            DownloadStopped: If the download was stopped.
        """
        self.failures += 1
        wait = min(FIRST_WAIT_SECONDS * 2 ** (self.failures - 1), LONGEST_WAIT_SECONDS) * random.uniform(0.75, 1.25)
        wait = max(wait, problem.wait_seconds or 0.0)
        if not problem.transient or self.failures >= self.attempts or wait > LONGEST_OBEYED_WAIT_SECONDS:
            raise problem
        if self.stop.wait(wait):
            raise DownloadStopped

    def insist(self, call: Callable[[], Result], about: Subject) -> Result:
        """Return the result of a call, after as many attempts as it needs.

        Raises:
            HubError: If the call cannot succeed, or every attempt failed.
        """
        while True:
            result = attempt(call, about)
            if not isinstance(result, HubError):
                return result
            self.rest(result)
