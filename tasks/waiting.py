"""Waiting for another run or process, with a notice in the log that names it."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import BaseFileLock, Timeout

if TYPE_CHECKING:
    Log = logging.Logger | logging.LoggerAdapter[Any]

T = TypeVar("T")

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


def take_next(items: queue.SimpleQueue[T], timeout_seconds: float = float("inf")) -> T:
    """Return the next item of a queue; wait for it.

    Raises:
        queue.Empty: If there is none in time.
    """
    end = time.monotonic() + timeout_seconds
    while True:
        left = end - time.monotonic()
        try:
            return items.get(timeout=max(0.0, min(left, WAKE_SECONDS)))
        except queue.Empty:
            if left <= 0:
                raise


def result_of(future: Future[T]) -> T:
    """Return the result of a future; wait for it. What the future raises is raised."""
    while not future.done():
        with suppress(FutureTimeout):
            return future.result(timeout=WAKE_SECONDS)
    return future.result()


def join_thread(thread: threading.Thread) -> None:
    """Wait for the end of a thread."""
    while thread.is_alive():
        thread.join(WAKE_SECONDS)


def wait_for(event: threading.Event, seconds: float) -> bool:
    """Wait for an event, and return whether it came in time."""
    end = time.monotonic() + seconds
    while not event.is_set() and (left := end - time.monotonic()) > 0:
        event.wait(min(left, WAKE_SECONDS))
    return event.is_set()


@contextmanager
def held(lock: threading.RLock, notice: WaitNotice | None = None) -> Iterator[None]:
    """Hold a lock.

    It has to be one that knows its owner: the exception may come after the lock was got and before anybody knows it.
    """
    try:
        while not lock.acquire(timeout=WAKE_SECONDS):
            if notice is not None:
                notice.tell()
        yield
    finally:
        with suppress(RuntimeError):  # not ours: the exception came while it was waited for
            lock.release()


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
