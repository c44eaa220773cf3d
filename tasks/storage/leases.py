"""Leases: who uses a folder of the store right now. The kernel takes a lease back when its process ends."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Self

from prefect_huggingface.tasks.errors import ModelSourceError
from prefect_huggingface.tasks.storage.exports.layout import LEASE


class Lease:
    """A lock on an open file, held until it is closed."""

    def __init__(self, descriptor: int | None) -> None:
        self.descriptor = descriptor

    def close(self) -> None:
        """Give the lease back. Closing again does nothing."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hold_export(path: Path) -> Lease:
    """Hold an export, or a snapshot of the store, so that it is not evicted while it is in use.

    Also notes that it was used now. A folder that does not belong to a store is never evicted; its lease is empty.

    Args:
        path: Folder of the export.

    Returns:
        The lease; close it, or use it in a `with` statement.

    Raises:
        ModelSourceError: If the folder was removed in the meantime.
    """
    lease_path = path / LEASE
    try:
        descriptor = os.open(lease_path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        if path.exists():
            return Lease(None)
        raise _removed(path) from None
    lease = Lease(descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not _is_same_file(descriptor, lease_path):
        lease.close()
        raise _removed(path)
    note_use(path)
    return lease


def note_use(path: Path) -> None:
    """Note that a folder of the store was used now."""
    with suppress(OSError):  # a store on a read-only disk
        os.utime(path / LEASE)


def take_alone(lease_path: Path, create: bool = False) -> Lease | None:
    """Return the lease of a file that nobody else holds, or None if somebody does or there is no such file."""
    flags = os.O_RDWR | os.O_CREAT if create else os.O_RDONLY
    try:
        descriptor = os.open(lease_path, flags | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:
        return None
    lease = Lease(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lease.close()
        return None
    # The file may have been unlinked between the opening and the locking; such a lease protects nothing.
    if not _is_same_file(descriptor, lease_path):
        lease.close()
        return None
    return lease


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except OSError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _removed(path: Path) -> ModelSourceError:
    return ModelSourceError(f"Folder {str(path)!r} was removed from the store. Ask for the model again.")
