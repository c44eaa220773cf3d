"""Scratch data on disk that a killed process does not leave behind for ever."""

from __future__ import annotations

import glob
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prefect_huggingface.tasks.storage.leases import take_alone


def open_scratch_database() -> sqlite3.Connection:
    """Return an empty database on disk, in autocommit mode. Its file has no name, so it ends with the process."""
    base = sqlite3.connect("", isolation_level=None)
    for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "cache_size=-4096"):
        base.execute(f"PRAGMA {pragma}")
    return base


@contextmanager
def scratch_file(folder: str | os.PathLike[str], name: str) -> Iterator[Path]:
    """Yield a new hidden file, and remove it at the end if it is still there.

    The files that killed processes left here for the same name are removed first: nobody holds a lock on them.

    Args:
        folder: Folder of the file. It must exist.
        name: Name of the file that this one is to become.
    """
    for left in glob.glob(os.path.join(glob.escape(os.fspath(folder)), f".{glob.escape(name)}.*.tmp")):
        with suppress(OSError):
            _remove_unlocked(Path(left))
    path = Path(folder, f".{name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    # Unlike `mkstemp`, this gives the file the permissions that the user's mask asks for.
    path.touch(exist_ok=False)
    lease = None
    try:
        with suppress(OSError):  # a file system without locks: then nobody can lock it, and nobody removes it
            lease = take_alone(path)
        yield path
    finally:
        path.unlink(missing_ok=True)
        if lease is not None:
            lease.close()


def _remove_unlocked(path: Path) -> None:
    lease = take_alone(path)
    if lease is not None:
        with lease:
            path.unlink()
