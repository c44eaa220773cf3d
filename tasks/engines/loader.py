"""Loading in a thread of its own: who waits for a model can be interrupted, however long a library takes for it.

A model may spend half a minute in one call of a library, which hears of no exception and no signal. It may also import
half of the libraries, and an exception that meets an import can leave the interpreter's import lock held for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any, TypeVar

from prefect_huggingface.tasks.waiting import WaitNotice, finished, result_of

T = TypeVar("T")


class Loader:
    """Runs one call at a time. When its caller is interrupted, the call goes on to its end."""

    def __init__(self) -> None:
        self._last: Future[Any] = Future()
        self._last.set_result(None)

    def run(self, call: Callable[[], T]) -> T:
        """Return what a call returns, and raise what it raises. It sees the run and the settings of the caller."""
        self._last = future = Future[T]()
        arguments = (copy_context().run, call, future)
        threading.Thread(target=_fulfil, args=arguments, name="load-model", daemon=True).start()
        return result_of(future)

    def wait(self, notice: WaitNotice | None = None) -> None:
        """Wait for the end of a call whose caller was interrupted."""
        while not finished(self._last):
            if notice is not None:
                notice.tell()


def _fulfil(run: Callable[[Callable[[], T]], T], call: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(run(call))
    except BaseException as exc:
        future.set_exception(exc)
