"""Loading in a thread of its own: who waits for a model can be interrupted, however long a library takes for it.

A model may spend half a minute in one call of a library, which hears of no exception and no signal. It may also import
half of the libraries, and an exception that meets an import can leave the interpreter's import lock held for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import TypeVar

from prefect_huggingface.tasks.waiting import WAKE_SECONDS, WaitNotice, result_of, wait_for

T = TypeVar("T")


class Loader:
    """Runs one call at a time. When its caller is interrupted, the call goes on to its end."""

    def __init__(self) -> None:
        self._idle = threading.Event()
        self._idle.set()

    def run(self, call: Callable[[], T]) -> T:
        """Return what a call returns, and raise what it raises. It sees the run and the settings of the caller."""
        context, future = copy_context(), Future[T]()

        def fulfil() -> None:
            self._idle.clear()  # here and not by the caller, who may be interrupted before there is a thread
            try:
                future.set_result(context.run(call))
            except BaseException as exc:
                future.set_exception(exc)
            finally:
                self._idle.set()

        threading.Thread(target=fulfil, name="load-model", daemon=True).start()
        return result_of(future)

    def wait(self, notice: WaitNotice) -> None:
        """Wait for the end of a call whose caller was interrupted."""
        while not wait_for(self._idle, WAKE_SECONDS):
            notice.tell()
