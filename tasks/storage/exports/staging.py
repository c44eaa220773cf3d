"""Staging: folders in which exports are made before they get their names.

Each staging folder has a lock file beside it. The lock is held by the process that makes the export and by its child.
The kernel frees it when both are gone, and whoever comes next sweeps the folder away.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from prefect_huggingface.tasks.errors import ExportError
from prefect_huggingface.tasks.storage.exports.layout import LEASE, staging_folder
from prefect_huggingface.tasks.storage.leases import take_alone
from prefect_huggingface.tasks.storage.places import sync_path


@dataclass(frozen=True, slots=True)
class Staging:
    """A staging folder and the descriptor of its lock, which a child process inherits."""

    path: Path
    descriptor: int


@contextmanager
def open_staging(store: Path) -> Iterator[Staging]:
    """Make a staging folder and remove what is left of it at the end.

    Raises:
        ExportError: If the store cannot be written to.
    """
    parent = staging_folder(store)
    name = secrets.token_hex(8)
    lock_path = parent / f"{name}.lock"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while (lease := take_alone(lock_path, create=True)) is None:
            pass  # a sweep took the new file away before it was locked
        (parent / name).mkdir()
    except OSError as error:
        raise not_writable(store, error) from None
    with lease:
        try:
            yield Staging(parent / name, lease.descriptor if lease.descriptor is not None else -1)
        finally:
            shutil.rmtree(parent / name, ignore_errors=True)
            with suppress(OSError):
                lock_path.unlink()


def sweep_staging(store: Path) -> int:
    """Remove the staging folders that no live process owns, and return how many there were."""
    parent = staging_folder(store)
    swept = 0
    with suppress(OSError):
        names = {name.removesuffix(".lock") for name in os.listdir(parent)}
        for name in sorted(names):
            swept += _sweep_one(parent, name)
    return swept


def _sweep_one(parent: Path, name: str) -> bool:
    lock_path = parent / f"{name}.lock"
    # The lock is made before its folder and goes after it, so a folder without a lock is nobody's.
    lease = take_alone(lock_path)
    if lease is None and lock_path.exists():
        return False
    shutil.rmtree(parent / name, ignore_errors=True)
    with suppress(OSError):
        lock_path.unlink()
    if lease is not None:
        lease.close()
    return True


def publish(staged: Path, target: Path) -> None:
    """Give a finished folder its name. Everything is on disk before the name is.

    Args:
        staged: Finished folder on the same file system.
        target: Its name in the store; nothing may be there.
    """
    (staged / LEASE).touch()
    for path in [*staged.rglob("*"), staged]:
        if not path.is_symlink():
            sync_path(path)
    os.rename(staged, target)
    sync_path(target.parent)


def discard(store: Path, folder: Path) -> None:
    """Take a folder out of the store: first its name, in one step, then its files."""
    with open_staging(store) as staging:
        with suppress(FileNotFoundError):
            os.rename(folder, staging.path / "discarded")


def not_writable(store: Path, error: OSError) -> ExportError:
    """Return the error for a store that cannot be written to."""
    return ExportError(
        f"Store {str(store)!r} cannot be written to: {error.strerror or error}. "
        "Free some space or correct its permissions, or set another `path` of the store."
    )
