"""What Prefect stores for a background task, and how it is removed: the prompts as parameters, the answers as result.

Both lie in clear in Prefect's storage, and Prefect never removes them. They go when the call is over.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.client.orchestration import get_client
from prefect.filesystems import LocalFileSystem
from prefect.logging import get_logger
from prefect.results import aresolve_result_storage, get_or_create_default_task_scheduling_storage

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
        remove_stored(storage, f"parameters/{kept}")


def _remove_result(record: Any) -> None:
    # A run without a result has something else there.
    key, block = getattr(record, "storage_key", None), getattr(record, "storage_block_id", None)
    if key is not None and block is not None:
        remove_stored(asyncio.run(aresolve_result_storage(block)), key)
    elif key is not None and Path(key).is_absolute():
        Path(key).unlink(missing_ok=True)


def remove_stored(storage: Any, path: str) -> None:
    """Remove a file from a storage block, or empty it where the block can only write."""
    if isinstance(storage, LocalFileSystem):
        Path(storage.basepath or ".").expanduser().joinpath(path).unlink(missing_ok=True)
    else:
        storage.write_path(path, b"")
