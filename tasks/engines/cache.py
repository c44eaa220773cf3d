"""The engines of this process.

The table belongs to this module and not to any task: Prefect sends tasks to workers by value, and what a task's own
module holds would be copied with them.
"""

from __future__ import annotations

import atexit
import os

from prefect_huggingface.blocks import InferenceEndpoint, LocalModel
from prefect_huggingface.tasks.engines.cache_entries import EngineState
from prefect_huggingface.tasks.engines.cache_table import GIB, EngineCache
from prefect_huggingface.tasks.engines.protocol import Engine

_cache = EngineCache()


def _forget_after_fork() -> None:
    # The threads of the engines do not live in the child.
    global _cache
    _cache = EngineCache()


def _unload_at_exit() -> None:
    # A thread that is in OpenVINO when the interpreter ends would crash the process.
    _cache.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
atexit.register(_unload_at_exit)


def load_engine(model: LocalModel | InferenceEndpoint) -> Engine:
    """Return the engine of a model. It is loaded once per process and shared by all callers.

    The model is downloaded and exported first where needed. Models that differ only in their generation options share
    an engine. Keep the result as long as it is used, and close nothing: an engine that nobody holds is closed when its
    memory is needed.

    Args:
        model: Model, backend, device and options; or an endpoint, which is asked nothing before the first request.

    Raises:
        ModelSourceError: If the model is a folder that is missing or holds no model.
        DownloadError: If the model is on the Hub and cannot be had.
        ExportError: If the OpenVINO export failed.
        EngineError: If the model cannot be loaded with these settings, or does not fit into the memory.
    """
    if isinstance(model, InferenceEndpoint):
        from prefect_huggingface.tasks.engines.endpoints.cache import load_endpoint

        return load_endpoint(model)
    return _cache.get(model)


def unload_engines() -> int:
    """Close all engines of this process, also those in use, and return how many there were."""
    from prefect_huggingface.tasks.engines.endpoints.cache import unload_endpoints

    return _cache.unload() + unload_endpoints()


def unload_idle_engines(idle_seconds: float) -> int:
    """Close the engines that nobody has used for so long, give their memory back, and return how many there were."""
    return _cache.unload_idle(idle_seconds)


def list_engines() -> list[EngineState]:
    """Return what is known of the engines of this process, the last used one last."""
    return _cache.states()


def memory_budget() -> int:
    """Return the resident memory that this process may take, in bytes."""
    return _cache.budget_bytes


def set_memory_budget(size_gb: float | None) -> None:
    """Set how much resident memory this process may take.

    Args:
        size_gb: Size in units of 2^30 bytes. None for `PREFECT_HUGGINGFACE_MEMORY_GB`, or else 80 % of the machine.
    """
    _cache.set_budget(None if size_gb is None else int(size_gb * GIB))
