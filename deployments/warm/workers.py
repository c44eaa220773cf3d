"""The worker type `hugging-face-warm`: flow runs in threads of one process, whose imports and models stay loaded."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import anyio
from prefect.client.schemas.objects import State, StateType
from prefect.states import AwaitingRetry
from prefect.types._datetime import now
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult

from prefect_huggingface.deployments.warm.adoption import adopt_runs, run_filters
from prefect_huggingface.deployments.warm.endings import Ending
from prefect_huggingface.deployments.warm.flow_threads import FlowThread
from prefect_huggingface.deployments.warm.health import HealthPage, WorkerHealth
from prefect_huggingface.deployments.warm.idleness import IdleWatch
from prefect_huggingface.deployments.warm.marks import WorkerMark

if TYPE_CHECKING:
    import anyio.abc
    from prefect.client.schemas.objects import FlowRun

WATCH_SECONDS = 1.0
ADOPT_SECONDS = 10.0
PRESS_SECONDS = 0.1
# A run that has not ended by then is said to be stuck.
STUCK_SECONDS = 15.0
# A worker that is to stop waits so long for its runs.
STOP_SECONDS = 8.0


class WarmResult(BaseWorkerResult):
    """Result of a flow run in a warm worker. The state of the run is written by its thread."""


class WarmWorker(BaseWorker[BaseJobConfiguration, BaseVariables, WarmResult]):
    """Runs flow runs in threads of its own process."""

    type = "hugging-face-warm"
    job_configuration = BaseJobConfiguration
    _description = (
        "Run flows inside one long-lived process that keeps its imports and its Hugging Face models loaded. "
        "Flows are imported from installed modules."
    )
    _documentation_url = "https://docs.prefect.io/v3/concepts/workers"

    @classmethod
    def get_default_base_job_template(cls) -> dict[str, Any]:
        """Return what a deployment may set for its runs: nothing, as they share one process."""
        # The server wants a job configuration that is not empty.
        return {"job_configuration": {"labels": {}}, "variables": {"type": "object", "properties": {}}}

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.mark = WorkerMark.own(self.name)
        self.health = WorkerHealth(self.name, f"{os.getpid()} on {socket.gethostname()}")
        self.idle = IdleWatch()
        self._threads: dict[UUID, FlowThread] = {}
        self._page = HealthPage(self.health)
        self._watching = anyio.CancelScope()
        self._adopted = 0.0

    async def setup(self) -> None:
        """Prepare the worker, and begin to watch over its runs."""
        await super().setup()
        assert self._runs_task_group is not None
        self._runs_task_group.start_soon(self._watch)

    async def teardown(self, *exc_info: Any) -> None:
        """Stop. Runs that are at work are interrupted and put back."""
        self._watching.cancel()
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as group:
                for thread in list(self._threads.values()):
                    group.start_soon(self._put_back, thread)
            with anyio.move_on_after(2):
                await self._try(partial(self._page.show, self.client, stopped=True))
        await super().teardown(*exc_info)

    async def run(
        self,
        flow_run: FlowRun,
        configuration: BaseJobConfiguration,
        task_status: anyio.abc.TaskStatus[Any] | None = None,
    ) -> WarmResult:
        """Run a flow run in a thread and wait for its end."""
        thread = self._threads[flow_run.id] = FlowThread(flow_run.id)
        self.health.now[flow_run.name] = thread.began
        state = "Unknown"
        thread.start()
        if task_status is not None:
            task_status.started(str(self.mark))
        try:
            state = await asyncio.shield(asyncio.wrap_future(thread.done))
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await self._put_back(thread)
            raise
        finally:
            self._threads.pop(flow_run.id, None)
            self.health.note_end(flow_run.name, state)
        return WarmResult(identifier=str(self.mark), status_code=0)

    async def _propose_pending_state(self, flow_run: FlowRun) -> bool:
        accepted = await super()._propose_pending_state(flow_run)
        if accepted:
            # From here on a successor can tell whose run it is.
            await self.client.update_flow_run(flow_run.id, infrastructure_pid=str(self.mark))
        return accepted

    async def _cancel_run(self, flow_run_id: UUID) -> None:
        await self._try(self._look_for_cancelled)

    async def _watch(self) -> None:
        with self._watching:
            while True:
                await self._try(self._adopt)
                await self._try(self._look_for_cancelled)
                await self._try(partial(anyio.to_thread.run_sync, partial(self.idle.look, bool(self._threads))))
                await self._try(partial(self._page.show, self.client))
                await anyio.sleep(WATCH_SECONDS)

    async def _try(self, step: Any) -> None:
        try:
            await step()
        except Exception as exc:
            # The server may be away for a while; the next look tries again.
            self._logger.debug("The watch over the runs failed: %s: %s", type(exc).__name__, exc)

    async def _adopt(self) -> None:
        if self._adopted and time.monotonic() - self._adopted < ADOPT_SECONDS:
            return
        adopt = partial(adopt_runs, self._work_pool_name, self.mark, self._is_own, first=not self._adopted)
        count = await anyio.to_thread.run_sync(adopt)
        self._adopted = time.monotonic()
        if count:
            self._logger.info("Adopted %d runs of workers that are gone.", count)

    def _is_own(self, run: FlowRun) -> bool:
        return run.id in self._threads or run.id in self._submitting_flow_run_ids

    async def _look_for_cancelled(self) -> None:
        """End the runs of this process that somebody has cancelled."""
        if not self._threads or self._runs_task_group is None:
            return
        states = (StateType.CANCELLING, StateType.CANCELLED)
        filters = run_filters(self._work_pool_name, *states, ids=self._threads)
        for run in await self.client.read_flow_runs(**filters):
            thread = self._threads.get(run.id)
            if thread is not None and thread.ending is None:
                thread.end(Ending.CANCEL)
                self.get_flow_run_logger(run).info("The run is cancelled and will end.")
                self._runs_task_group.start_soon(self._press, thread)

    async def _put_back(self, thread: FlowThread) -> None:
        thread.end(Ending.PUT_BACK)
        with anyio.move_on_after(STOP_SECONDS):
            await self._press(thread)
        if thread.done.done():
            return
        run = thread.flow_run_id
        self._logger.warning("Flow run %s does not end in %g s. It ends with the process.", run, STOP_SECONDS)
        later: State[Any] = AwaitingRetry(scheduled_time=now("UTC") + timedelta(seconds=STOP_SECONDS))
        with anyio.move_on_after(2):
            await self._try(partial(self.client.set_flow_run_state, run, later, force=True))

    async def _press(self, thread: FlowThread) -> None:
        """Interrupt a run until it has ended."""
        began, told = time.monotonic(), False
        while not thread.done.done():
            thread.press()
            await anyio.sleep(PRESS_SECONDS)
            if time.monotonic() - began > STUCK_SECONDS and not told:
                told = True
                self._logger.warning(
                    "Flow run %s does not end %g s after it was cancelled. It is asked again until it does; where it "
                    "never does, stop the worker.", thread.flow_run_id, STUCK_SECONDS,
                )  # fmt: skip
