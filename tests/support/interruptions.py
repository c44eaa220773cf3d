"""Threads into which an exception is put, as Prefect's timeout and the cancellation of a warm worker do."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


class Interruption(BaseException):
    """What is put into a thread."""


class InterruptibleThread(threading.Thread):
    """Runs a call in a thread and keeps what it raises."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._call()
        except BaseException as exc:
            self.error = exc.with_traceback(None)

    def send(self) -> None:
        """Put the exception into the thread, anywhere but where CPython would leave its import lock held."""
        while (frame := sys._current_frames().get(self.ident or 0)) and "importlib" in frame.f_code.co_filename:
            time.sleep(0.001)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident or 0), ctypes.py_object(Interruption))

    def interrupt(self, seconds: float = 30) -> float:
        """Put the exception into the thread, and return after how many seconds it ended."""
        began = time.monotonic()
        self.send()
        self.join(seconds)
        assert not self.is_alive(), "the thread does not end"
        return time.monotonic() - began
