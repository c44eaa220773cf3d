"""The snapshots of a store: which there are, how large they are, when they were last used, and how to remove one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from prefect_huggingface.tasks.hub_errors import StoreBusyError
from prefect_huggingface.tasks.storage.exports.layout import LEASE
from prefect_huggingface.tasks.storage.hub.layout import REPOSITORY_LOCK, RepositoryFolder
from prefect_huggingface.tasks.storage.hub.manifests import manifests_of
from prefect_huggingface.tasks.storage.leases import take_alone


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """One snapshot of a store, complete or not.

    Attributes:
        repo_id: Repository.
        commit: Commit.
        path: Folder of the snapshot.
        root: Cache folder that it is in; each Hub has its own.
        size_bytes: Size of its files.
        freed_bytes: What its removal would free; files that other snapshots share stay.
        last_used: Time of its last use (seconds since 1970).
        complete: Whether it has a manifest.
    """

    repo_id: str
    commit: str
    path: Path
    root: Path
    size_bytes: int
    freed_bytes: int
    last_used: float
    complete: bool


def list_snapshots(store_path: Path) -> list[StoredSnapshot]:
    """Return the snapshots of all Hubs in a store, the least recently used first."""
    found = [snapshot for folder in _repositories(store_path) for snapshot in _snapshots(folder)]
    return sorted(found, key=lambda snapshot: snapshot.last_used)


def _repositories(store_path: Path) -> Iterator[RepositoryFolder]:
    for root in sorted([store_path / "hub", *store_path.glob("hub@*")]):
        for path in sorted(root.glob("models--*")):
            yield RepositoryFolder(root, path.name.removeprefix("models--").replace("--", "/"))


def _snapshots(folder: RepositoryFolder) -> Iterator[StoredSnapshot]:
    contents = _contents(folder)
    with_manifest = {manifest.commit for manifest in manifests_of(folder)}
    for path, files in contents.items():
        others = {file for other, more in contents.items() if other != path for file in more}
        yield StoredSnapshot(
            repo_id=folder.repo_id,
            commit=path.name,
            path=path,
            root=folder.root,
            size_bytes=sum(files.values()),
            freed_bytes=sum(size for file, size in files.items() if file not in others),
            last_used=_last_used(path),
            complete=path.name in with_manifest,
        )


def _contents(folder: RepositoryFolder) -> dict[Path, dict[Path, int]]:
    """Return the sizes of the contents of each snapshot of a repository."""
    contents: dict[Path, dict[Path, int]] = {}
    for snapshot in sorted((folder.path / "snapshots").glob("*")):
        files = contents[snapshot] = {}
        for file in snapshot.rglob("*"):
            with suppress(OSError):
                if file.is_file() and file.name != LEASE:
                    files[file.resolve()] = file.stat().st_size
    return contents


def _last_used(path: Path) -> float:
    for place in (path / LEASE, path):
        with suppress(OSError):
            return place.stat().st_mtime
    return 0.0


def remove_snapshot(snapshot: StoredSnapshot) -> int:
    """Remove a snapshot with the contents that no other one shares, and return the number of freed bytes.

    Raises:
        StoreBusyError: If it is in use or being downloaded. Nothing is removed then.
    """
    folder = RepositoryFolder(snapshot.root, snapshot.repo_id)
    with ExitStack() as held:
        lease = take_alone(snapshot.path / LEASE)
        if lease is None and (snapshot.path / LEASE).exists():
            raise _in_use(snapshot)
        if lease is not None:
            held.enter_context(lease)
        try:
            held.enter_context(folder.lock(REPOSITORY_LOCK, timeout_seconds=0.0))
        except StoreBusyError:
            raise _in_use(snapshot) from None
        return _remove(folder, snapshot)


def _remove(folder: RepositoryFolder, snapshot: StoredSnapshot) -> int:
    """Remove the proof of completeness first and the contents last, so that no state between is taken for whole."""
    for manifest in (folder.path / "manifests").glob(f"{snapshot.commit}-*.json"):
        manifest.unlink(missing_ok=True)
    for reference in (folder.path / "refs").rglob("*"):
        if reference.is_file() and reference.read_text(encoding="utf-8").strip() == snapshot.commit:
            reference.unlink(missing_ok=True)
    contents = _contents(folder)
    files = contents.pop(snapshot.path, {})
    shared = {file for more in contents.values() for file in more}
    shutil.rmtree(snapshot.path, ignore_errors=True)
    freed = 0
    for file, size in files.items():
        if file not in shared:
            file.unlink(missing_ok=True)
            freed += size
    return freed


def _in_use(snapshot: StoredSnapshot) -> StoreBusyError:
    text = f"Snapshot {snapshot.commit[:12]!r} of {snapshot.repo_id!r} is in use. Remove it when its users have ended."
    return StoreBusyError(text, repo_id=snapshot.repo_id)


def remove_partials(store_path: Path, unused_seconds: float = 7 * 24 * 3600.0) -> int:
    """Remove contents that were never completed and have not grown for so long; return the number of freed bytes."""
    freed, oldest = 0, time.time() - unused_seconds
    for folder in _repositories(store_path):
        for place in [*(folder.path / "partials").glob("*"), *(folder.path / "blobs").glob("*.incomplete")]:
            with suppress(OSError):
                found = place.lstat()
                if found.st_mtime < oldest:
                    place.unlink()
                    freed += found.st_size
    return freed
