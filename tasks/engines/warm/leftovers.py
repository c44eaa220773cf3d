"""What Prefect stores for a background task: the prompts as its parameters, the answers as its result.

Both lie in clear in Prefect's storage, and Prefect never removes them. They go when the call is over.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.client.orchestration import get_client
from prefect.filesystems import LocalFileSystem
from prefect.logging import get_logger
from prefect.results import ResultRecordMetadata, get_or_create_default_task_scheduling_storage, resolve_result_storage

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.schemas.objects import State

logger = get_logger(__name__)


def remove_leftovers(task_run_id: UUID, state: State[Any]) -> None:
    """Remove the stored parameters and the stored result of a run that has ended, and whose result was read.

    Args:
        task_run_id: Run of the background task.
        state: Its last state.
    """
    try:
        _remove_parameters(task_run_id)
        if isinstance(state.data, ResultRecordMetadata):
            _remove_result(state.data)
    except Exception as exc:
        logger.warning(
            "The prompts and answers of task run %s stay in Prefect's storage, as they cannot be removed: %s: %s",
            task_run_id, type(exc).__name__, exc,
        )  # fmt: skip


def _remove_parameters(task_run_id: UUID) -> None:
    with get_client(sync_client=True) as client:
        states = client.read_task_run_states(task_run_id)
    storage = asyncio.run(get_or_create_default_task_scheduling_storage())
    for kept in {state.state_details.task_parameters_id for state in states} - {None}:
        _remove(storage, f"parameters/{kept}")


def _remove_result(result: ResultRecordMetadata) -> None:
    if result.storage_key is None:
        return
    if result.storage_block_id is not None:
        _remove(resolve_result_storage(result.storage_block_id, _sync=True), result.storage_key)
    elif Path(result.storage_key).is_absolute():
        Path(result.storage_key).unlink(missing_ok=True)


def _remove(storage: Any, path: str) -> None:
    if isinstance(storage, LocalFileSystem):
        Path(storage.basepath or ".").expanduser().joinpath(path).unlink(missing_ok=True)
    else:
        # A storage block of Prefect can write and read only.
        storage.write_path(path, b"")
