"""What Prefect stores for a background task, and how it is removed: the prompts as parameters, the answers as result.

Both lie in clear in Prefect's storage, and Prefect never removes them. The prompts go when the worker has read them,
the answers when the caller has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.filesystems import LocalFileSystem
from prefect.logging import get_logger
from prefect.results import aresolve_result_storage, get_or_create_default_task_scheduling_storage

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

logger = get_logger(__name__)


def remove_parameters(states: Sequence[State[Any]]) -> None:
    """Remove the stored parameters of a run, after they were read or when nobody is to read them.

    Args:
        states: All states of the run.
    """
    with _warned("prompts"):
        kept = {state.state_details.task_parameters_id for state in states} - {None}
        storage = asyncio.run(get_or_create_default_task_scheduling_storage()) if kept else None
        for name in kept:
            remove_stored(storage, f"parameters/{name}")


def remove_result(state: State[Any]) -> None:
    """Remove the stored result of a run, after it was read.

    Args:
        state: Last state of the run.
    """
    with _warned("answers"):
        _remove_result(state.data)


@contextmanager
def _warned(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as exc:
        logger.warning("The %s of a call stay in Prefect's storage: %s: %s", what, type(exc).__name__, exc)


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
