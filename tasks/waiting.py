"""Waiting for another run or process, with a notice in the log that names it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import BaseFileLock, Timeout

if TYPE_CHECKING:
    Log = logging.Logger | logging.LoggerAdapter[Any]

WAKE_SECONDS = 0.5
FIRST_NOTICE_SECONDS = 1.0
NOTICE_GROWTH = 3.0


class WaitNotice:
    """Says in a log that something is waited for: soon after the beginning, then at growing intervals.

    Args:
        log: Log of the run that waits.
        what: What is waited for, a sentence without its end.
        first_seconds: When to say it for the first time.
    """

    def __init__(self, log: Log, what: str, first_seconds: float = FIRST_NOTICE_SECONDS) -> None:
        self._log, self._what = log, what
        self._began = time.monotonic()
        self._next = first_seconds

    def tell(self) -> None:
        """Write a line if it is time for one."""
        waited = time.monotonic() - self._began
        if waited >= self._next:
            self._next = waited * NOTICE_GROWTH
            self._log.info("%s, for %.0f seconds so far.", self._what, waited)


@contextmanager
def file_held(lock: BaseFileLock, timeout_seconds: float, notice: WaitNotice) -> Iterator[None]:
    """Hold the lock of a file.

    Args:
        lock: Lock to acquire.
        timeout_seconds: Longest wait, or -1 to wait for ever.
        notice: Says who is waited for.

    Raises:
        filelock.Timeout: If somebody else holds it for longer.
    """
    end = time.monotonic() + (timeout_seconds if timeout_seconds >= 0 else float("inf"))
    while not lock.is_locked:
        left = end - time.monotonic()
        try:
            lock.acquire(timeout=max(0.0, min(left, WAKE_SECONDS)))
        except Timeout:
            if left <= 0:
                raise
            notice.tell()
    try:
        yield
    finally:
        lock.release()


def holder_of(path: str | Path) -> str:
    """Return who holds the lock of a file, in words."""
    with suppress(OSError, ValueError, IndexError):
        state = os.stat(path)
        wanted = f"{os.major(state.st_dev):02x}:{os.minor(state.st_dev):02x}:{state.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            # 1: FLOCK ADVISORY WRITE <process> <device>:<inode> 0 EOF; the queue of an entry follows it with "->".
            if fields[1] == "FLOCK" and fields[5] == wanted and int(fields[4]) > 0:
                return "this process" if int(fields[4]) == os.getpid() else f"process {fields[4]}"
    return "another process"
