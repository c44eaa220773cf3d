"""The export store: each export is made once, whole or not at all, and known to be good."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.errors import ExportError
from prefect_huggingface.tasks.records import Export, Snapshot
from prefect_huggingface.tasks.run_logs import run_log
from prefect_huggingface.tasks.storage.exports.eviction import evict
from prefect_huggingface.tasks.storage.exports.layout import export_name, exports_folder, find_export_folder, lock_path
from prefect_huggingface.tasks.storage.exports.manifests import (
    SCHEMA,
    Manifest,
    as_export,
    describe_files,
    file_state,
    find_damage,
    read_manifest,
    remember_state,
    write_manifest,
)
from prefect_huggingface.tasks.storage.exports.openvino_folders import check_precision
from prefect_huggingface.tasks.storage.exports.plans import ExportPlan, check_plan, gigabytes, make_plan
from prefect_huggingface.tasks.storage.exports.process import run_export
from prefect_huggingface.tasks.storage.exports.recipes import Recipe, export_key, resolve_recipe
from prefect_huggingface.tasks.storage.exports.remote_sources import check_source, plan_source
from prefect_huggingface.tasks.storage.exports.source_weights import measure_weights
from prefect_huggingface.tasks.storage.exports.staging import (
    discard,
    not_writable,
    open_staging,
    publish,
    sweep_staging,
)
from prefect_huggingface.tasks.storage.exports.versions import export_versions
from prefect_huggingface.tasks.storage.folders import is_openvino_folder, read_json
from prefect_huggingface.tasks.storage.gguf_files import describe_gguf, gguf_commit
from prefect_huggingface.tasks.storage.leases import hold_export, note_use
from prefect_huggingface.tasks.storage.snapshots import get_snapshot
from prefect_huggingface.tasks.waiting import WaitNotice, file_held, holder_of

Run = Callable[[Snapshot, Recipe, Path, int], Mapping[str, Any]]
"""Makes an export of a snapshot by a recipe in a work folder; the last argument is the lock that a child inherits."""


def get_export(model: LocalModel, verify: bool = False) -> Export:
    """Return the OpenVINO export of a model; make it if it is not there.

    A folder or repository that holds an OpenVINO model is used as it is.

    Args:
        model: Model with backend "openvino".
        verify: Check the hashes of an export that is there, also if nothing seems to have changed.

    Raises:
        ModelSourceError: If the model is a folder that is missing or holds no model.
        DownloadError: If the model is on the Hub and cannot be had.
        PlanError: If the export cannot succeed; nothing was started.
        ExportError: If the export failed; nothing was published.
    """
    repo_id = None if model.is_local else model.model_id
    recipe, versions, store = resolve_recipe(model, repo_id), export_versions(), model.store_path
    if not model.is_local:
        planned = plan_source(model)
        # The source may have been evicted since; what was made from it is enough.
        if planned.commit is not None:
            found = find_export(store, export_key(planned.commit, recipe, versions, SCHEMA), verify=verify)
            if found is not None:
                return found
        check_source(model, recipe, planned)
    elif model.is_gguf:
        # What was made from the file is enough; its checkpoint may have been evicted since.
        commit = gguf_commit(model)
        found = find_export(store, export_key(commit, recipe, versions, SCHEMA), verify=verify)
        if found is not None:
            return found
        source = describe_gguf(model)
        check_plan(make_plan(model, recipe, commit, "", source.config, source.weights))
    snapshot = get_snapshot(model)
    if is_openvino_folder(file.path for file in snapshot.files):
        return use_openvino_folder(model, snapshot)
    key = export_key(snapshot.commit, recipe, versions, SCHEMA)
    found = find_export(store, key, verify=verify)
    if found is not None:
        return found
    plan = make_plan(
        model, recipe, snapshot.commit, key, read_json(snapshot.path / "config.json"),
        measure_weights(snapshot.path, [file.path for file in snapshot.files]),
    )  # fmt: skip
    return make_once(model, snapshot, recipe, plan, run_export)


def make_once(model: LocalModel, snapshot: Snapshot, recipe: Recipe, plan: ExportPlan, run: Run) -> Export:
    """Make an export, or wait for the process that is making it.

    Args:
        model: Model with its store.
        snapshot: Source of the export.
        recipe: Every setting.
        plan: Plan of the export, with its key.
        run: Makes the export in a work folder.

    Raises:
        PlanError: If the export cannot succeed; nothing was started.
        ExportError: If the export failed, or another process takes too long.
    """
    store, key = model.store_path, plan.key
    path = lock_path(store, key)
    check_plan(plan)
    longest = model.get_store().lock_timeout_seconds
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        notice = WaitNotice(run_log(), f"Waiting for {holder_of(path)}, which makes the same export {key[:16]}")
        with file_held(FileLock(path), longest, notice), hold_export(snapshot.path):
            found = find_export(store, key)
            if found is not None:
                return found
            made = make_export(store, snapshot, recipe, plan, run)
            keep_within_budget(model, made)
            return made
    except Timeout:
        raise ExportError(
            f"Another process has been making the export {key[:16]} for {longest:g} seconds. "
            "Wait for it, or set a longer `lock_timeout_seconds` of the store."
        ) from None
    except OSError as error:
        raise not_writable(store, error) from None


def keep_within_budget(model: LocalModel, made: Export) -> None:
    """Remove the least recently used models beyond the size limit of the store, but not what was just made."""
    limit = model.get_store().max_size_gb
    if limit is None:
        return
    report = evict(model.store_path, int(limit * 1e9), keep=[made.path])
    for entry in report.removed:
        run_log().info("Removed %s %s (%s) from the store.", entry.kind, entry.name, gigabytes(entry.size_bytes))
    if report.kept_bytes > limit * 1e9:
        run_log().warning("The store holds %s, more than its %g GB.", gigabytes(report.kept_bytes), limit)


def use_openvino_folder(model: LocalModel, snapshot: Snapshot) -> Export:
    """Return the record of an OpenVINO model that is used as it is.

    Raises:
        PlanError: If it would have to be quantized once more for the weight format of the model.
    """
    check_precision(model, snapshot)
    return Export(
        key=snapshot.commit,
        path=snapshot.path,
        source=snapshot.repo_id or str(snapshot.path),
        commit=snapshot.commit,
        size_bytes=sum(file.size for file in snapshot.files),
        reused=True,
    )


def find_export(store: Path, key: str, verify: bool = False) -> Export | None:
    """Return an export of the store, or None if it is not there or is damaged. Note its use.

    Args:
        store: Folder of the store.
        key: Key of the export.
        verify: Check the hashes in any case.
    """
    folder = find_export_folder(store, key)
    manifest = None if folder is None else read_manifest(folder)
    if folder is None or manifest is None or manifest.key != key:
        return None
    damage = find_damage(folder, manifest, verify=verify)
    if damage is not None:
        run_log().warning("The export %s is damaged and is made anew. %s", folder.name, damage)
        return None
    note_use(folder)
    return as_export(folder, manifest, reused=True)


def make_export(store: Path, snapshot: Snapshot, recipe: Recipe, plan: ExportPlan, run: Run) -> Export:
    """Make an export and publish it. The caller holds the lock of its key.

    Raises:
        ExportError: If the export failed; nothing was published.
    """
    log = run_log()
    started = time.monotonic()
    sweep_staging(store)
    source = plan.source
    # One line, with the notes in it: an export has one line for each step, and these two.
    into = "a checkpoint" if recipe.task == "checkpoint" else f"OpenVINO in {recipe.weight_format}"
    log.info("%s", " ".join((f"Exporting {source} to {into}.", *plan.notes)))
    for warning in plan.warnings:
        log.warning("%s", warning)
    with open_staging(store) as staging:
        report = run(snapshot, recipe, staging.path, staging.descriptor)
        output = staging.path / "output"
        manifest = Manifest(
            key=plan.key,
            source=source,
            commit=snapshot.commit,
            recipe=recipe.as_dict(),
            versions=export_versions(),
            files=describe_files(output),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=_rounded({**report["seconds"], "total": time.monotonic() - started}),
            peak_memory_bytes=report["peak_memory_bytes"],
            weights=report["weights"],
            notes=plan.notes,
        )
        write_manifest(output, manifest)
        folder = exports_folder(store) / export_name(source, recipe.weight_format, plan.key)
        old = find_export_folder(store, plan.key)
        if old is not None:
            discard(store, old)
        publish(output, folder)
    remember_state(folder, file_state(folder, manifest))
    made = as_export(folder, manifest, reused=False)
    log.info("Exported %s in %.1f s: %s in %s", source, manifest.seconds["total"], gigabytes(made.size_bytes), folder)
    return made


def _rounded(seconds: Mapping[str, Any]) -> dict[str, float]:
    return {name: round(float(value), 3) for name, value in seconds.items()}
