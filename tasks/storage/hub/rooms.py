"""Room on the disk: what a download still needs, and whether there is enough."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from prefect_huggingface.tasks.hub_errors import DiskFullError
from prefect_huggingface.tasks.storage.hub.explanations import Subject
from prefect_huggingface.tasks.storage.hub.layout import RepositoryFolder
from prefect_huggingface.tasks.storage.hub.revisions import RepositoryFile

SPARE_BYTES = 1 << 20


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


def check_room(folder: RepositoryFolder, files: Sequence[RepositoryFile], about: Subject) -> None:
    """Check that the missing bytes fit, before the first one is asked for.

    Raises:
        DiskFullError: If they do not.
    """
    missing = sum((file.size or 0) - bytes_here(folder, file) for file in files)
    free = free_bytes(folder)
    if missing and missing + SPARE_BYTES > free:
        raise DiskFullError(
            f"{about.repo_id!r} needs {missing / 1e9:.3f} GB more than is here, and {free / 1e9:.3f} GB are free in "
            f"{str(folder.root)!r}. "
            "Make room, or choose another folder in the block's store.",
            **about.fields(needed_bytes=missing, free_bytes=free),
        )
