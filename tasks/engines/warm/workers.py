"""The workers that serve warm models: who is there, and what it means for a request when nobody is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prefect_huggingface.blocks import WarmModel
from prefect_huggingface.tasks.records import ErrorCode

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

COMMAND = "python -m prefect_huggingface.deployments.warm_worker"
LOST_SECONDS = 3.0


class WarmFailure(Exception):
    """A call that has no answer. It never leaves an engine.

    Attributes:
        code: Kind of the error.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Unwanted(Exception):
    """Nobody waits for the answer any more."""


class WorkerWatch:
    """Which warm workers are connected, and since when a worker is missing.

    Args:
        warm: Whose workers they are.
        task_key: Key of the task that they serve.
    """

    def __init__(self, warm: WarmModel, task_key: str) -> None:
        self._warm, self._task_key = warm, task_key
        self._missing: dict[str | None, float] = {}
        self.online: set[str] = set()

    def look(self, client: SyncPrefectClient) -> None:
        """Ask Prefect.

        Raises:
            WarmFailure: If there has been no worker for too long.
        """
        wanted = {"task_worker_filter": {"task_keys": [self._task_key]}}
        answer = client.request("POST", "/task_workers/filter", json=wanted)
        self.online = {worker["identifier"] for worker in answer.json()}
        if self.missing_for(None, bool(self.online)) > self._warm.worker_timeout_seconds:
            raise WarmFailure(
                "unavailable",
                f"There has been no warm worker for the model {self._warm.model!r} for "
                f"{self._warm.worker_timeout_seconds:g} seconds. Start one at the same Prefect server: `{COMMAND}`.",
            )

    def is_lost(self, worker: str) -> bool:
        """Tell whether a worker has been gone for long enough to believe it."""
        return self.missing_for(worker, worker in self.online) >= LOST_SECONDS

    def missing_for(self, worker: str | None, is_there: bool) -> float:
        """Note whether a worker is there, None for any, and return for how many seconds it has not been."""
        if is_there:
            self._missing.pop(worker, None)
            return 0.0
        return time.monotonic() - self._missing.setdefault(worker, time.monotonic())
