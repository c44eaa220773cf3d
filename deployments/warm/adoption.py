"""Adoption: runs whose warm worker is gone are scheduled again, so that no run stays Running for ever.

Batches go on from their journals, so that being started again costs them only what was not committed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from filelock import FileLock, Timeout
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.logging.loggers import get_logger
from prefect.types._datetime import now

from prefect_huggingface.deployments.warm.endings import cancel_run, put_back
from prefect_huggingface.deployments.warm.marks import WorkerMark
from prefect_huggingface.tasks.artifacts import make_key

logger = get_logger(__name__)

# Between Prefect's Pending and the mark of the worker lie milliseconds: a run without a mark for so long has no worker.
UNMARKED_SECONDS = 60
# A run that this process has marked and does not run has ended here, and its state could not be written.
LEFT_SECONDS = 5
MAX_RUNS = 200


def run_filters(pool: str, *states: StateType, ids: Iterable[UUID] | None = None) -> dict[str, Any]:
    """Return the filters of the runs of a pool that are in some states; of all of them, or of some.

    Args:
        pool: Work pool of the runs.
        states: Types of their states.
        ids: Which runs to look at; all when left out.
    """
    return {
        "flow_run_filter": FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))),
            id=None if ids is None else FlowRunFilterId(any_=list(ids)),
        ),
        "work_pool_filter": WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
        "limit": MAX_RUNS,
    }


def adopt_runs(pool: str, mark: WorkerMark, is_own: Callable[[FlowRun], bool], *, first: bool) -> int:
    """Schedule the runs of workers that are gone again, cancel those that were to be cancelled, and count them.

    A worker is gone when its process on this machine has ended. A worker of the same name on another machine is taken
    for gone when this one starts: names are to be given once.

    Args:
        pool: Work pool of the runs.
        mark: Mark of this worker.
        is_own: Tells whether a run is at work in this process.
        first: Whether this worker has just been started.
    """
    states = (StateType.RUNNING, StateType.PENDING, StateType.CANCELLING)
    try:
        # Two workers that start at once adopt one after the other, so that none takes back what the other has begun.
        with FileLock(Path(tempfile.gettempdir()) / f"prefect-warm-{make_key(pool)}.lock", timeout=10):
            with get_client(sync_client=True) as client:
                runs = client.read_flow_runs(**run_filters(pool, *states))
                orphans = [run for run in runs if not is_own(run) and _is_orphan(run, mark, first)]
                return sum(_adopt(client, run) for run in orphans)
    except Timeout:
        return 0


def _is_orphan(run: FlowRun, mark: WorkerMark, first: bool) -> bool:
    owner = WorkerMark.parse(run.infrastructure_pid)
    if owner is None:
        return run.infrastructure_pid is None and _is_forgotten(run)
    if owner == mark:
        return _age(run) > LEFT_SECONDS
    return owner.is_gone or (first and owner.name == mark.name and not owner.is_here)


def _is_forgotten(run: FlowRun) -> bool:
    return run.state is not None and run.state.is_pending() and _age(run) > UNMARKED_SECONDS


def _age(run: FlowRun) -> float:
    if run.state is None:
        return 0
    age: timedelta = now("UTC") - run.state.timestamp
    return age.total_seconds()


def _adopt(client: SyncPrefectClient, run: FlowRun) -> int:
    try:
        if run.state is not None and run.state.is_cancelling():
            cancel_run(client, run)
        else:
            put_back(client, run, "The worker of the run is gone. The run goes on where it was in another one.")
    except Exception as exc:
        logger.warning("Flow run %s of a worker that is gone could not be adopted: %s.", run.id, type(exc).__name__)
        return 0
    logger.info("Adopted flow run %s (%s) of a worker that is gone.", run.name, run.id)
    return 1
