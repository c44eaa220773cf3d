"""Interrupting a flow run that runs in threads of this process.

An exception is put into the thread of the run. The interpreter raises it at the next step of Python code there, so
that every `finally` runs, generators are closed and engines drop the run's requests.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any
from uuid import UUID

from prefect.exceptions import TerminationSignal

# Where a thread holds a lock that no `with` gives back yet, an exception would leave the lock held for ever.
_LOCK_FILES = ("logging/__init__.py", "httpcore/_synchronization.py", "/weakref.py", "importlib._bootstrap>")
_WAITS = ("wait", "join", "_wait_for_tstate_lock")


class RunInterrupted(TerminationSignal):
    """The worker has ended this run, because somebody cancelled it or because the worker stops."""

    def __init__(self) -> None:
        super().__init__(signal.SIGTERM)


def interrupt_thread(ident: int, anywhere: bool = False) -> bool:
    """Put `RunInterrupted` into a thread, and tell whether this was done.

    Args:
        ident: Number of the thread.
        anywhere: Whether to do it also where the thread may be taking a lock.
    """
    frame = sys._current_frames().get(ident)
    if frame is None or not (anywhere or _is_safe(frame)):
        return False
    reached = ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(RunInterrupted))
    return bool(reached)


def forget_interruption() -> None:
    """Drop what was put into this thread and is not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), None)


def task_threads(flow_run_id: UUID, main_thread: int) -> set[int]:
    """Return the numbers of the threads, beside its own, that run tasks of a flow run or of its subflows."""
    frames = sys._current_frames()
    runs = {flow_run_id}
    if main_thread in frames:
        runs |= {run for kind, run in _runs_in(frames[main_thread]) if kind == "flow"}
    return {
        ident for ident, frame in frames.items()
        if ident != main_thread and any(run in runs for _, run in _runs_in(frame))
    }  # fmt: skip


def _is_safe(frame: FrameType) -> bool:
    code = frame.f_code
    if code.co_filename.endswith("/threading.py"):
        return code.co_name in _WAITS
    return not code.co_filename.endswith(_LOCK_FILES)


def _runs_in(frame: FrameType | None) -> Iterator[tuple[str, UUID]]:
    """Yield the runs whose engines are on a stack: its flow runs, and the flow runs that its tasks belong to."""
    while frame is not None:
        if frame.f_code.co_name in ("run_flow_sync", "run_task_sync", "_drive_sync"):
            engine: Any = frame.f_locals.get("engine")
            flow_run, task_run = getattr(engine, "flow_run", None), getattr(engine, "task_run", None)
            if flow_run is not None:
                yield "flow", flow_run.id
            if task_run is not None and task_run.flow_run_id is not None:
                yield "task", task_run.flow_run_id
        frame = frame.f_back
