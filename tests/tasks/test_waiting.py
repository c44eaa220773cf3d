"""Waits: an exception that is put into a waiting thread arrives, and what the thread holds is given back."""

from __future__ import annotations

import logging
import queue
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from functools import partial

import pytest
from filelock import FileLock, Timeout

from prefect_huggingface.tasks import waiting
from prefect_huggingface.tasks.waiting import WaitNotice, file_held, held, holder_of, result_of, take_next
from support.interruptions import InterruptibleThread, Interruption

NOTICE = WaitNotice(logging.getLogger(__name__), "Waiting for a test")


def hold(lock) -> None:
    with held(lock):
        pass


def hold_file(path) -> None:
    with file_held(FileLock(path), -1, NOTICE):
        pass


def read_silence() -> None:
    with subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE) as process:
        try:
            waiting.read_some(process.stdout)
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["queue", "future", "thread", "event", "sleep", "pipe", "lock", "file"])
def test_an_exception_reaches_every_wait(kind, tmp_path):
    lock, other, ended = threading.RLock(), FileLock(tmp_path / "lock"), threading.Event()
    waits = {
        "queue": partial(take_next, queue.SimpleQueue()),
        "future": partial(result_of, Future()),
        "thread": partial(waiting.join_thread, threading.Thread(target=ended.wait)),
        "event": partial(waiting.wait_for, threading.Event(), 60),
        "sleep": partial(waiting.sleep_for, 60),
        "pipe": read_silence,
        "lock": partial(hold, lock),
        "file": partial(hold_file, tmp_path / "lock"),
    }
    if kind == "thread":
        waits["thread"].args[0].start()
    with lock, other:
        thread = InterruptibleThread(waits[kind])
        time.sleep(0.3)
        assert thread.is_alive()
        assert thread.interrupt() < 2
    ended.set()
    assert isinstance(thread.error, Interruption)
    # What was waited for and not got is not held.
    assert lock.acquire(timeout=1)
    with FileLock(tmp_path / "lock", timeout=1):
        pass


def test_a_lock_that_comes_with_the_exception_is_given_back():
    # The lock gets free while the exception is on its way, so that the thread gets both.
    for _ in range(30):
        lock = threading.RLock()
        with lock:
            thread = InterruptibleThread(partial(hold, lock))
            time.sleep(0.01)
            thread.send()
        thread.join(5)
        assert lock.acquire(timeout=1)


def test_waits_end_with_what_is_waited_for():
    items: queue.SimpleQueue[int] = queue.SimpleQueue()
    items.put(1)
    assert take_next(items) == 1
    with pytest.raises(queue.Empty):
        take_next(items, 0.1)
    future: Future[int] = Future()
    threading.Timer(0.7, future.set_result, [2]).start()
    assert result_of(future) == 2
    with pytest.raises(ZeroDivisionError):
        failed: Future[int] = Future()
        failed.set_exception(ZeroDivisionError())
        result_of(failed)


def test_a_lock_of_a_file_is_refused_in_time_and_its_holder_named(tmp_path):
    path = tmp_path / "lock"
    code = (
        f"import filelock, time; lock = filelock.FileLock({str(path)!r}); "
        "lock.acquire(); print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            assert holder_of(path) == f"process {process.pid}"
            with pytest.raises(Timeout), file_held(FileLock(path), 0, NOTICE):
                pass
        finally:
            process.kill()
    with file_held(FileLock(path), 5, NOTICE):
        assert holder_of(path) == "this process"
    assert holder_of(tmp_path / "no lock") == "another process"


def test_a_notice_comes_once_and_then_at_growing_intervals(caplog, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    notice = WaitNotice(logging.getLogger("waits"), "Waiting for process 1, which downloads")
    told = []
    with caplog.at_level(logging.INFO, "waits"):
        for _ in range(7200):
            now += 0.5
            before = len(caplog.records)
            notice.tell()
            if len(caplog.records) > before:
                told.append(now - 100)
    assert told == [1, 3, 9, 27, 81, 243, 729, 2187]
    assert caplog.messages[0] == "Waiting for process 1, which downloads, for 1 seconds so far."
