"""One flow run in a thread of this process, and how it is ended from outside."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import Future
from contextvars import copy_context
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.exceptions import Abort, Pause
from prefect.logging.loggers import flow_run_logger

from prefect_huggingface.deployments.warm.endings import Ending, settle_run
from prefect_huggingface.deployments.warm.flow_engines import drive_flow
from prefect_huggingface.deployments.warm.flow_sources import load_run_flow
from prefect_huggingface.deployments.warm.interruptions import (
    RunInterrupted,
    forget_interruption,
    interrupt_thread,
    task_threads,
)

# A run that orders its threads to end, as a batch does, gets so long for it.
TASK_GRACE_SECONDS = 2.0
# Who caught the exception without ending is asked again.
AGAIN_SECONDS = 15.0
# So long it is looked for a place where the thread takes no lock.
CAREFUL_SECONDS = 5.0


class FlowThread:
    """A flow run in a thread of its own.

    Args:
        flow_run_id: Run that is to be run.
    """

    def __init__(self, flow_run_id: UUID) -> None:
        self.flow_run_id = flow_run_id
        self.began = time.time()
        self.done: Future[str] = Future()  # of the name of the last state
        self._gate = threading.Lock()
        self._open = True
        self._ending: Ending | None = None
        self._asked = 0.0
        self._pressed: dict[int, float] = {}
        context = copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._run,), name=f"flow-run-{flow_run_id}", daemon=True
        )

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def ending(self) -> Ending | None:
        """What the run is ended for, if it is."""
        return self._ending

    def end(self, ending: Ending) -> None:
        """Say that the run is to end. What was said first holds; `press` makes it end."""
        if self._ending is None:
            self._asked = time.monotonic()
            self._ending = ending

    def press(self) -> None:
        """Interrupt the threads of the run that are not interrupted yet. To be called again and again."""
        now = time.monotonic()
        careful = now - self._asked < CAREFUL_SECONDS
        main = self._thread.ident or 0
        with self._gate:
            if not self._open:
                return
            if self._is_due(main, now) and interrupt_thread(main, anywhere=not careful):
                self._pressed[main] = now
            if now - self._asked < TASK_GRACE_SECONDS:
                return
            for ident in task_threads(self.flow_run_id, main):
                if self._is_due(ident, now) and interrupt_thread(ident, anywhere=not careful):
                    self._pressed[ident] = now

    def _is_due(self, ident: int, now: float) -> bool:
        return now - self._pressed.get(ident, -AGAIN_SECONDS) >= AGAIN_SECONDS

    def _run(self) -> None:
        state = "Unknown"
        try:
            error = self._drive()
            state = settle_run(self.flow_run_id, self._ending, error)
        finally:
            if self._ending is not None:
                gc.collect()  # what the run held of the engine is given back
            self.done.set_result(state)

    def _drive(self) -> BaseException | None:
        """Run the flow, and return what ended it where no state says so."""
        error: BaseException | None = None
        try:
            with get_client(sync_client=True) as client:
                flow_run = client.read_flow_run(self.flow_run_id)
                if flow_run.state is None or not (flow_run.state.is_cancelling() or flow_run.state.is_final()):
                    flow = load_run_flow(client, flow_run, flow_run_logger(flow_run))
                    drive_flow(flow, flow_run, lambda: self._ending is not None)
        except (Abort, Pause):
            error = None
        except BaseException as exc:
            error = exc.with_traceback(None)
        self._close()
        return error

    def _close(self) -> None:
        """From here on nothing is put into this thread, and what was put is dropped."""
        while True:
            try:
                with self._gate:
                    self._open = False
                    forget_interruption()
                return
            except RunInterrupted:
                continue
