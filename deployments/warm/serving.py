"""Background requests: tasks that other processes hand to this one, so that they share its loaded models."""

from __future__ import annotations

import asyncio
import time

import anyio
from prefect.logging.loggers import get_logger
from prefect.task_worker import TaskWorker

from prefect_huggingface.deployments.warm.health import WorkerHealth
from prefect_huggingface.deployments.warm.interruptions import interrupt_thread
from prefect_huggingface.tasks.warm_requests import SERVED_TASKS

logger = get_logger(__name__)

AGAIN_SECONDS = 5.0


class _TaskWorker(TaskWorker):
    def handle_sigterm(self, signum: int, frame: object) -> None:
        # Prefect's task worker takes SIGTERM for itself, each time that it starts, and would end the process. The
        # event loop hears of the signal all the same, and calls what the command has registered there.
        return


class RequestService:
    """Serves background requests beside the flow runs of a process.

    Args:
        health: Receives the number of requests.
        limit: How many are at work at once.
    """

    def __init__(self, health: WorkerHealth, limit: int) -> None:
        self._health = health
        self._limit = limit
        self._worker: _TaskWorker | None = None

    async def run(self) -> None:
        """Serve until this is cancelled. A lost connection is taken up again."""
        while True:
            self._worker = _TaskWorker(*SERVED_TASKS, limit=self._limit)
            try:
                async with anyio.create_task_group() as group:
                    group.start_soon(self._count, self._worker, self._health.requests or 0)
                    await self._worker.astart()
            except Exception as exc:
                logger.warning(
                    "Background requests are not served for %g s: %s: %s", AGAIN_SECONDS, type(exc).__name__, exc
                )
            await anyio.sleep(AGAIN_SECONDS)

    async def stop(self, seconds: float) -> None:
        """Interrupt the requests that are at work, so that those who wait for them hear of it."""
        end = time.monotonic() + seconds
        pressed: set[int] = set()
        while self._worker is not None and self._worker.current_tasks and time.monotonic() < end:
            for thread in list(self._worker._executor._threads):
                if thread.ident and thread.ident not in pressed and interrupt_thread(thread.ident):
                    pressed.add(thread.ident)
            await asyncio.sleep(0.1)

    async def _count(self, worker: TaskWorker, before: int) -> None:
        while True:
            self._health.requests = before + sum(worker.finished_task_runs.values())
            await anyio.sleep(1)
