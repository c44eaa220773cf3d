"""Engines that nobody has used for a while are closed, and their memory goes back to the system."""

from __future__ import annotations

import gc
import os
import time

from prefect.logging.loggers import get_logger

from prefect_huggingface.tasks.engines.cache import list_engines, unload_idle_engines
from prefect_huggingface.tasks.errors import WorkerError

logger = get_logger(__name__)

IDLE_VARIABLE = "PREFECT_HUGGINGFACE_IDLE_MINUTES"
DEFAULT_MINUTES = 60.0
LOOK_SECONDS = 15.0


def idle_minutes() -> float:
    """Return after how many minutes without use an engine is closed; zero means never.

    Raises:
        WorkerError: If the environment names no such number.
    """
    given = os.environ.get(IDLE_VARIABLE, "")
    try:
        minutes = float(given) if given else DEFAULT_MINUTES
    except ValueError:
        minutes = -1
    if not 0 <= minutes < float("inf"):
        raise WorkerError(f"{IDLE_VARIABLE} is {given!r}. Set it to minutes, such as 30, or to 0 for never.")
    return minutes


class IdleWatch:
    """Looks for idle engines now and then."""

    def __init__(self) -> None:
        self.minutes = idle_minutes()
        self._last = time.monotonic()

    def look(self, at_work: bool) -> None:
        """Close what is idle, if it is time to look.

        Args:
            at_work: Whether runs are at work.
        """
        seconds = self.minutes * 60
        if not seconds or time.monotonic() - self._last < min(LOOK_SECONDS, seconds / 2):
            return
        self._last = time.monotonic()
        engines = list_engines()
        if not engines:
            return
        if not at_work and any(engine.users for engine in engines):
            gc.collect()  # a failed run may still hold its engine, in the frames of its exception
        closed = unload_idle_engines(seconds)
        if closed:
            logger.info("Closed %d models that nobody used for %g minutes.", closed, self.minutes)
