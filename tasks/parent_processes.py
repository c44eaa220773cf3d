"""The end of a run with the process that started it, so that no run goes on unseen when its worker was killed."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil

RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"
"""Prefect sets it for the process of a run."""

LOOK_SECONDS = 1.0
_watching = threading.Lock()


def end_with_parent() -> None:
    """End this process, gently, when its parent is gone. Nothing is done where the process is not that of one run.

    What is finished is committed then, and the run is a crashed one that can be started again.
    """
    if RUN_VARIABLE in os.environ and _watching.acquire(blocking=False):
        threading.Thread(target=_watch, args=(psutil.Process().parent(),), name="watch-parent", daemon=True).start()


def _watch(parent: psutil.Process | None) -> None:
    # The kernel's signal for this hangs on the thread that started the process, and not on its process. An orphan gets
    # another parent, except on Windows, where it keeps the number of one that is gone.
    while parent is not None and os.getppid() == parent.pid and parent.is_running():
        time.sleep(LOOK_SECONDS)
    # No word to the log: the worker has read it, and to write it would end this thread.
    if os.name == "posix":
        os.kill(os.getpid(), signal.SIGTERM)
    else:  # there, that call would end the process at once
        signal.raise_signal(signal.SIGTERM)
