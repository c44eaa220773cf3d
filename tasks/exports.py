"""Tasks that make OpenVINO exports, tell beforehand what that would take, and keep the store small."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.tasks.assets import note_export
from prefect_huggingface.tasks.downloads import HUB_RETRIES
from prefect_huggingface.tasks.errors import PlanError
from prefect_huggingface.tasks.records import Export
from prefect_huggingface.tasks.run_logs import library_logs
from prefect_huggingface.tasks.storage.eviction import PruneReport, StoredModel, evict, list_models
from prefect_huggingface.tasks.storage.exports.plan import (
    ExportPlan,
    check_openvino_folder,
    describe_source,
    make_plan,
    plan_room,
)
from prefect_huggingface.tasks.storage.exports.recipes import resolve_recipe
from prefect_huggingface.tasks.storage.exports.store import find_export, get_export
from prefect_huggingface.tasks.storage.folders import is_openvino_folder

__all__ = ["ExportPlan", "export_to_openvino", "list_store", "plan_export", "prune_store"]


def export_model(model: LocalModel, verify: bool = False) -> Export:
    """Return the OpenVINO export of a model; download and export it if it is not there.

    The export is made once, whoever asks and however often, and it is checked before it is there. A folder or
    repository that holds an OpenVINO model is used as it is.

    Args:
        model: Model with backend "openvino", its weight format and its store.
        verify: Check the hashes of an export that is there, also if nothing seems to have changed.

    Returns:
        Where the export is, and how it was made.

    Raises:
        PlanError: If the export cannot succeed; nothing was started.
        ModelSourceError: If the model is a folder that is missing or holds no model.
        DownloadError: If the model is on the Hub and cannot be had.
        ExportError: If the export failed; nothing was published.
    """
    _check_backend(model)
    with library_logs():
        export = get_export(model, verify=verify)
    note_export(model, export)
    return export


def plan_model(model: LocalModel) -> ExportPlan:
    """Return what an export would be and would take. Nothing is downloaded or made.

    Args:
        model: Model with backend "openvino".

    Returns:
        The plan. Its `problems` say why the export cannot succeed, if it cannot.

    Raises:
        PlanError: If the options of the model do not fit each other.
        ModelSourceError: If the model is a folder that is missing or holds no model.
        DownloadError: If the Hub cannot tell what the model is.
    """
    _check_backend(model)
    recipe, source = resolve_recipe(model, None if model.is_local else model.model_id), describe_source(model)
    if is_openvino_folder(source.files):
        if source.snapshot is not None:
            check_openvino_folder(model, source.snapshot)
        problems = (source.problem,) if source.problem else ()
        room = plan_room(model, recipe, source.commit, source.weights)
        changes: dict[str, Any] = {"key": source.commit, "recipe": {}, "disk_bytes": 0, "memory_bytes": 0}
        return replace(room, **changes, problems=problems, warnings=())
    plan = make_plan(model, recipe, source)
    found = find_export(model.store_path, plan.key)
    return plan if found is None else replace(plan, path=found.path, problems=(), warnings=())


def list_stored(store: ModelStore | None = None) -> list[StoredModel]:
    """Return the exports and snapshots of a store, the least recently used first.

    Args:
        store: The store. When left out, the default store.
    """
    return list_models(store or ModelStore())


def prune_stored(
    store: ModelStore | None = None, max_size_gb: float | None = None, default_size_gb: float | None = None
) -> PruneReport:
    """Remove the least recently used models of a store until it is within a size. What is in use stays.

    Args:
        store: The store. When left out, the default store.
        max_size_gb: Size to come down to, in units of 10^9 bytes. When left out, the size limit of the store; 0 removes
            everything that is not in use.
        default_size_gb: Size for a store without a limit of its own.

    Raises:
        PlanError: If there is neither a size nor a size limit of the store.
    """
    store = store or ModelStore()
    limit = next((size for size in (max_size_gb, store.max_size_gb, default_size_gb) if size is not None), None)
    if limit is None:
        raise PlanError(
            f"Store {str(store.folder)!r} has no size limit. Give `max_size_gb` here or in its block; 0 removes all "
            "that is idle."
        )
    return evict(store, int(limit * 1e9))


def _check_backend(model: LocalModel) -> None:
    if model.backend != "openvino":
        raise PlanError(f"An export is for backend 'openvino', got {model.backend!r}. Leave out the export.")


_SETTINGS: dict[str, Any] = {"cache_policy": NO_CACHE}
export_to_openvino = task(name="export-to-openvino", **_SETTINGS, **HUB_RETRIES)(export_model)
plan_export = task(name="plan-export", **_SETTINGS, **HUB_RETRIES)(plan_model)
list_store = task(name="list-store", **_SETTINGS)(list_stored)
prune_store = task(name="prune-store", **_SETTINGS)(prune_stored)
