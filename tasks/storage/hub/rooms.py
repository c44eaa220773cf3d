"""Room on the disk: what a download still needs, and whether there is enough."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from prefect.logging import get_logger

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.hub_errors import DiskFullError, StoreError, StoreLimitError
from prefect_huggingface.tasks.storage.hub.layout import RepositoryFolder
from prefect_huggingface.tasks.storage.hub.revisions import RepositoryFile

SPARE_BYTES = 1 << 20
logger = get_logger(__name__)


def bytes_here(folder: RepositoryFolder, file: RepositoryFile) -> int:
    """Return how many bytes of a file are in the store, complete or not."""
    if file.blob_name is None:
        return 0
    for place in (folder.blob(file.blob_name), folder.partial(file.blob_name)):
        if place.exists():
            return min(place.stat().st_size, file.size or 0)
    return 0


def free_bytes(folder: RepositoryFolder) -> int:
    """Return the free bytes of the disk that the store is on, or will be on."""
    place = folder.path
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def missing_bytes(folder: RepositoryFolder, files: Sequence[RepositoryFile]) -> int:
    """Return how many bytes of the files are not in the store yet."""
    return sum((file.size or 0) - bytes_here(folder, file) for file in files)


def find_lack(model: LocalModel, folder: RepositoryFolder, files: Sequence[RepositoryFile]) -> StoreError | None:
    """Return why the files cannot fit, on the disk or in the limit of the store, or None if they can."""
    limit = model.get_store().max_size_gb
    size = sum(file.size or 0 for file in files)
    fields: dict[str, Any] = {"repo_id": folder.repo_id}
    if limit is not None and size > limit * 1e9:
        text = (
            f"{folder.repo_id!r} has {size / 1e9:.3f} GB, and the store is limited to {limit:g} GB. "
            "Raise the store's `max_size_gb`, or choose a smaller model."
        )
        return StoreLimitError(text, needed_bytes=size, **fields)
    missing, free = missing_bytes(folder, files), free_bytes(folder)
    if missing and missing + SPARE_BYTES > free:
        text = (
            f"{folder.repo_id!r} needs {missing / 1e9:.3f} GB more than is here, and {free / 1e9:.3f} GB are free in "
            f"{str(folder.root)!r}. Make room, or choose another folder in the block's store."
        )
        return DiskFullError(text, needed_bytes=missing, free_bytes=free, **fields)
    return None


def make_room(model: LocalModel, folder: RepositoryFolder, commit: str, files: Sequence[RepositoryFile]) -> None:
    """Remove what was used least recently, so that the store keeps to its limit with the files that come.

    Nothing is removed if the store has no limit. What is in use stays.

    Raises:
        StoreError: If the files cannot fit.
    """
    limit = model.get_store().max_size_gb
    if limit is not None and find_lack(model, folder, files) is None:
        # Eviction is for exports as well, so it builds on this package.
        from prefect_huggingface.tasks.storage.exports.eviction import evict

        room = int(limit * 1e9) - missing_bytes(folder, files)
        report = evict(model.store_path, room, keep=[folder.snapshot(commit)])
        for entry in report.removed:
            logger.info("Removed %s %s (%.3f GB) from the store.", entry.kind, entry.name, entry.size_bytes / 1e9)
        if report.kept_bytes > room:
            logger.warning("The store will hold more than its %g GB, because the rest of it is in use.", limit)
    lack = find_lack(model, folder, files)
    if lack is not None:
        raise lack
