"""Leases: who uses a folder of the store right now. The system takes a lease back when its process ends.

Where the kernel has `flock`, a lease is a lock on the lease file itself: it needs no right to write, and a child
process can inherit it. Elsewhere, on Windows, it is a `ReadWriteLock` of filelock in the machine's temporary folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from filelock import ReadWriteLock, Timeout

from prefect_huggingface.tasks.errors import ModelSourceError

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

LEASE = ".lease"


class Lease:
    """A lock that is held until it is closed, from whatever thread.

    Attributes:
        descriptor: Open file that a child process can inherit, or None.
    """

    def __init__(self, descriptor: int | None = None, release: Callable[[], object] | None = None) -> None:
        self.descriptor, self._release = descriptor, release

    def close(self) -> None:
        """Give the lease back. Closing again does nothing."""
        descriptor, self.descriptor = self.descriptor, None
        release, self._release = self._release, None
        if descriptor is not None:
            os.close(descriptor)
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hold_export(path: Path) -> Lease:
    """Hold an export, or a snapshot of the store, so that it is not evicted until the lease is closed.

    Also notes that it was used now. A folder that does not belong to a store is never evicted; its lease is empty.

    Raises:
        ModelSourceError: If the folder was removed in the meantime.
    """
    place = lease_path(path)
    if not place.exists() and path.exists():
        return Lease()
    lease = _lock(place, alone=False)
    if lease is None:
        raise ModelSourceError(f"Folder {str(path)!r} was removed from the store. Ask for the model again.")
    note_use(path)
    return lease


def lease_path(folder: Path) -> Path:
    """Return the file by which a folder of the store is held. A snapshot of the cache has it beside, not within."""
    if folder.parent.name == "snapshots":
        return folder.parent.parent / "leases" / folder.name
    return folder / LEASE


def note_use(folder: Path, create: bool = False) -> None:
    """Note that a folder of the store was used now; with `create`, make the file by which it is held."""
    place = lease_path(folder)
    if create:
        place.parent.mkdir(exist_ok=True)
        place.touch()
    with suppress(OSError):  # a store on a read-only disk
        os.utime(place)


def last_used(folder: Path) -> float:
    """Return when a folder of the store was used last (seconds since 1970)."""
    for place in (lease_path(folder), folder):
        with suppress(OSError):
            return place.stat().st_mtime
    return 0.0


def take_alone(place: Path, create: bool = False) -> Lease | None:
    """Return the lease of a file that nobody else holds, or None if somebody does or there is no such file."""
    if create:
        place.touch()
    return _lock(place, alone=True)


def take_free(place: Path) -> Lease | None:
    """Return the lease of a file that nobody else holds, an empty one if there is no such file, or None."""
    lease = take_alone(place)
    return Lease() if lease is None and not place.exists() else lease


def is_held(folder: Path) -> bool:
    """Return whether a live process holds a folder of the store."""
    lease = take_free(lease_path(folder))
    if lease is not None:
        lease.close()
    return lease is None


def is_taken(lease_path: Path) -> bool:
    """Return whether somebody holds the lease of a file alone."""
    lease = _lock(lease_path, alone=False, wait=False)
    if lease is None:
        return lease_path.exists()
    lease.close()
    return False


def _lock(path: Path, alone: bool, wait: bool = True) -> Lease | None:
    """Lock a file that exists: alone if that is possible at once, or beside others once nobody has it alone."""
    lease = (_lock_by_kernel if fcntl is not None else _lock_by_name)(path, alone, wait and not alone)
    # The file may have been unlinked before the locking; such a lease protects nothing.
    if lease is not None and not _is_locked(path, lease):
        lease.close()
        return None
    return lease


def _lock_by_kernel(path: Path, alone: bool, wait: bool) -> Lease | None:
    try:
        lease = Lease(_open(path, alone))
    except FileNotFoundError:
        return None
    assert lease.descriptor is not None
    try:
        kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        fcntl.flock(lease.descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        lease.close()
        return None
    except OSError:
        lease.close()
        raise
    return lease


def _open(path: Path, alone: bool) -> int:
    """Open a file to lock it. NFS gives an exclusive lock only to those who may write, and a shared one to readers."""
    try:
        return os.open(path, os.O_RDWR if alone else os.O_RDONLY)
    except OSError as error:
        if not alone or error.errno not in (errno.EACCES, errno.EROFS):
            raise
        return os.open(path, os.O_RDONLY)  # a store that is only readable, and on a local disk


def _lock_by_name(path: Path, alone: bool, wait: bool) -> Lease | None:
    folder = Path(tempfile.gettempdir(), "prefect-huggingface-leases")
    folder.mkdir(exist_ok=True)
    digest = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()
    lock = ReadWriteLock(folder / f"{digest[:32]}.lock", is_singleton=False)
    try:
        if alone:
            lock.acquire_write(blocking=False)
        else:
            lock.acquire_read(blocking=wait)
    except Timeout:
        lock.close()
        return None
    return Lease(release=lock.close)


def _is_locked(path: Path, lease: Lease) -> bool:
    try:
        there = os.stat(path)
    except OSError:
        return False
    return lease.descriptor is None or os.path.samestat(os.fstat(lease.descriptor), there)
