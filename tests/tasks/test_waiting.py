"""Waiting for the lock of a file: refused in time, with the name of its holder, and said in the log."""

from __future__ import annotations

import logging
import subprocess
import sys
import time

import pytest
from filelock import FileLock, Timeout

from prefect_huggingface.tasks.waiting import WaitNotice, file_held, holder_of

NOTICE = WaitNotice(logging.getLogger(__name__), "Waiting for a test")


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
