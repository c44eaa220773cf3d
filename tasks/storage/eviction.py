"""Room in a store: what it holds, and which of it goes when there is too much. What is in use never goes.

Only what this library has downloaded or made counts and goes. Content that several snapshots share counts once.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from prefect_huggingface.blocks import ModelStore
from prefect_huggingface.tasks.hub_errors import StoreBusyError
from prefect_huggingface.tasks.run_logs import run_log
from prefect_huggingface.tasks.storage.files import MANIFEST, discard, exports_folder, gigabytes, sweep_staging
from prefect_huggingface.tasks.storage.hub.cache import StoredSnapshot, list_snapshots, remove_partials, remove_snapshot
from prefect_huggingface.tasks.storage.locks import LEASE, is_held, last_used, take_free


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One thing that a store holds.

    Attributes:
        kind: Whether it is an export or a snapshot of the Hub.
        name: Name of its folder for an export, repository id for a snapshot.
        path: Its folder.
        size_bytes: Size that its removal frees.
        last_used: Time of its last use (seconds since 1970).
        in_use: Whether a live process holds it.
        source: What an export was made from, the repository of a snapshot.
        commit: Commit of the source.
        recipe: Settings of an export.
    """

    kind: Literal["export", "snapshot"]
    name: str
    path: Path
    size_bytes: int
    last_used: float
    in_use: bool
    source: str | None = None
    commit: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PruneReport:
    """What was removed from a store.

    Attributes:
        removed: What was removed, the least recently used first.
        freed_bytes: Size of it.
        kept_bytes: Size of what is left.
        in_use: Paths that would have gone but are in use.
        abandoned_bytes: Size of downloads that were never finished and have not grown for a week; they go in any case.
    """

    removed: tuple[StoredModel, ...]
    freed_bytes: int
    kept_bytes: int
    in_use: tuple[Path, ...] = ()
    abandoned_bytes: int = 0


def list_models(store: ModelStore) -> list[StoredModel]:
    """Return the exports and snapshots of a store, the least recently used first."""
    return [entry for entry, _ in _list_entries(store)]


def _list_entries(store: ModelStore) -> list[tuple[StoredModel, StoredSnapshot | None]]:
    """Return what a store holds, each snapshot with its details."""
    snapshots = [(_describe_snapshot(snapshot), snapshot) for snapshot in list_snapshots(store)]
    exports = [(export, None) for export in _list_exports(store.folder)]
    return sorted([*exports, *snapshots], key=lambda entry: entry[0].last_used)


def make_room(store: ModelStore, keep: Path, coming_bytes: int = 0) -> None:
    """Remove what was used least recently, so that a store with a size limit keeps to it with what comes.

    What is in use stays, and so does the folder `keep`.
    """
    if store.max_size_gb is None:
        return
    room = int(store.max_size_gb * 1e9) - coming_bytes
    report = evict(store, room, keep=[keep])
    for entry in report.removed:
        run_log().info("Removed %s %s (%s) from the store.", entry.kind, entry.name, gigabytes(entry.size_bytes))
    if report.kept_bytes > room:
        size = gigabytes(report.kept_bytes + coming_bytes)
        run_log().warning("The store holds %s, more than its %g GB: the rest is in use.", size, store.max_size_gb)


def evict(store: ModelStore, limit_bytes: int, keep: Collection[Path] = ()) -> PruneReport:
    """Remove abandoned downloads, and the least recently used models until the rest is within a limit.

    Args:
        store: The store.
        limit_bytes: Size that the rest may have; 0 removes everything that is not in use.
        keep: Folders that stay in any case.
    """
    sweep_staging(store.folder)
    abandoned = remove_partials(store)
    entries = _list_entries(store)
    contents = {blob: size for _, snapshot in entries if snapshot for blob, size in snapshot.contents.items()}
    total = sum(contents.values()) + sum(entry.size_bytes for entry, snapshot in entries if snapshot is None)
    removed: list[StoredModel] = []
    in_use: list[Path] = []
    for entry, snapshot in entries:
        if total <= limit_bytes:
            break
        if entry.path in keep:
            continue
        freed = _remove(store.folder, entry, snapshot)
        if freed is None:
            in_use.append(entry.path)
            continue
        removed.append(replace(entry, size_bytes=freed))
        total -= freed
    return PruneReport(tuple(removed), sum(entry.size_bytes for entry in removed), total, tuple(in_use), abandoned)


def _remove(folder: Path, entry: StoredModel, snapshot: StoredSnapshot | None) -> int | None:
    """Remove an entry and return the freed bytes, or None if it is in use."""
    if snapshot is not None:
        with suppress(StoreBusyError):
            return remove_snapshot(snapshot)
        return None
    lease = take_free(entry.path / LEASE)
    if lease is None:
        return None
    with lease:
        discard(folder, entry.path)
    return entry.size_bytes


def _list_exports(store: Path) -> Iterator[StoredModel]:
    with suppress(FileNotFoundError):
        for folder in sorted(exports_folder(store).iterdir()):
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            manifest = _read_manifest(folder)
            yield StoredModel(
                kind="export",
                name=folder.name,
                path=folder,
                size_bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
                last_used=last_used(folder),
                in_use=is_held(folder),
                source=manifest.get("source"),
                commit=manifest.get("commit"),
                recipe=manifest.get("recipe") or {},
            )


def _read_manifest(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _describe_snapshot(snapshot: StoredSnapshot) -> StoredModel:
    return StoredModel(
        kind="snapshot",
        name=snapshot.repo_id,
        path=snapshot.path,
        size_bytes=snapshot.freed_bytes,
        last_used=snapshot.last_used,
        in_use=is_held(snapshot.path),
        source=snapshot.repo_id,
        commit=snapshot.commit,
    )
