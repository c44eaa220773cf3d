"""What becomes of a flow run in Prefect when it was ended from outside, or could not even begin."""

from __future__ import annotations

import inspect
import logging
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect._internal.engine import get_hook_name
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.flows import Flow
from prefect.logging.loggers import flow_run_logger, get_logger
from prefect.states import AwaitingRetry, Cancelled, Crashed, Failed
from prefect.types._datetime import now
from prefect.utilities.asyncutils import run_coro_as_sync

from prefect_huggingface.deployments.warm.flow_sources import load_run_flow
from prefect_huggingface.tasks.errors import WorkerError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

    Log = logging.Logger | logging.LoggerAdapter[Any]

logger = get_logger(__name__)


class Ending(Enum):
    """Why a run is ended, and what its state is then."""

    CANCEL = "cancelled"
    PUT_BACK = "put back"  # scheduled again, because its worker stops


def settle_run(flow_run_id: UUID, ending: Ending | None, error: BaseException | None) -> str:
    """Give a run that has ended the state that its engine left to others, and return the name of its last state.

    Args:
        flow_run_id: Run that has ended.
        ending: What it was ended for, if it was.
        error: What ended it, where no state says so.
    """
    try:
        with get_client(sync_client=True) as client:
            return _settle(client, client.read_flow_run(flow_run_id), ending, error)
    except Exception as exc:
        # The server is away, or the run is deleted. A later worker adopts what is left.
        logger.warning("The state of flow run %s could not be written: %s.", flow_run_id, type(exc).__name__)
        return "Unknown"


def _settle(client: SyncPrefectClient, flow_run: FlowRun, ending: Ending | None, error: BaseException | None) -> str:
    state = flow_run.state
    if state is not None and state.is_cancelling():
        cancel_run(client, flow_run)
    elif state is not None and state.is_final() and not (ending and state.is_crashed()):
        return state.name or state.type.value
    elif ending is Ending.CANCEL:
        cancel_run(client, flow_run)
    elif ending is Ending.PUT_BACK:
        put_back(client, flow_run, "The worker was stopped. The run goes on where it was in the next one.")
    elif error is not None:
        flow_run_logger(flow_run).error("The flow run could not be run: %s", error)
        _set(client, flow_run, _state_of(error))
    last = client.read_flow_run(flow_run.id).state
    return "Unknown" if last is None else last.name or last.type.value


def _state_of(error: BaseException) -> State[Any]:
    if isinstance(error, WorkerError):
        return Failed(message=str(error))
    return Crashed(message=f"The flow run ended with {type(error).__name__}: {error}")


def put_back(client: SyncPrefectClient, flow_run: FlowRun, message: str, delay_seconds: float = 0) -> None:
    """Schedule a run again, whatever its state is."""
    time = now("UTC") + timedelta(seconds=delay_seconds)
    _set(client, flow_run, AwaitingRetry(scheduled_time=time, message=message))
    flow_run_logger(flow_run).info(message)


def cancel_run(client: SyncPrefectClient, flow_run: FlowRun) -> None:
    """Run the cancellation hooks of a run that is no longer at work, and set its state."""
    log = flow_run_logger(flow_run)
    try:
        flow = load_run_flow(client, flow_run, logging.getLogger(f"{__name__}.unheard"))
        _run_hooks(flow, flow_run, log)
    except WorkerError as exc:
        log.warning("The cancellation hooks were not run: %s", exc)
    _set(client, flow_run, Cancelled(message="The flow run was cancelled, and its worker has ended it."))


def _run_hooks(flow: Flow[..., Any], flow_run: FlowRun, log: Log) -> None:
    hooks: list[Any] = flow.on_cancellation_hooks or []
    for hook in hooks:
        try:
            found = hook(flow=flow, flow_run=flow_run, state=flow_run.state)
            if inspect.iscoroutine(found):
                run_coro_as_sync(found)
        except Exception:
            log.error("The cancellation hook %r failed.", get_hook_name(hook), exc_info=True)


def _set(client: SyncPrefectClient, flow_run: FlowRun, state: State[Any]) -> None:
    client.set_flow_run_state(flow_run.id, state, force=True)
