"""Files and folders of a store: one hash, one atomic write, and temporary ones that a killed process does not leave."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_huggingface.tasks.errors import ExportError
from prefect_huggingface.tasks.storage.locks import LEASE, take_alone, take_free

if TYPE_CHECKING:
    from hashlib import _Hash

READ_BYTES = 1 << 20
MANIFEST = "export.json"
"""File of an export that says what it is. It is written last."""


def exports_folder(store: Path) -> Path:
    """Return the folder of the exports of a store."""
    return store / "exports"


def staging_folder(store: Path) -> Path:
    """Return the folder of the exports that are being made."""
    return exports_folder(store) / ".staging"


def hash_file(path: Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """Return the first 32 digits of the sha256 of a value as JSON; what JSON does not know counts by its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def new_hash(name: str, size: int) -> _Hash:
    """Return the empty hash for a content whose hash is `name`: sha256, or git blob sha1 for a short name."""
    if len(name) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def has_content(place: Path, size: int, name: str) -> bool:
    """Tell whether a file has the content with that hash."""
    try:
        with place.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != size:
                return False
            digest = new_hash(name, size)
            while block := file.read(READ_BYTES):
                digest.update(block)
    except OSError:
        return False
    return digest.hexdigest() == name


def sync_path(path: str | os.PathLike[str]) -> None:
    """Make a local file durable, or the names within a local folder."""
    if os.name == "nt" and os.path.isdir(path):
        return  # Windows cannot, and need not
    # Windows makes only files durable that are open for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_file(source: Path, target: Path) -> None:
    """Make a file appear under another name: as a link, or as a copy where the system allows no links."""
    try:
        target.symlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def write_file(path: Path, content: bytes, replace: bool = True, folder: Path | None = None) -> None:
    """Write a small file so that a reader sees the old or the new one, never a part, also after a power cut.

    Args:
        path: File to write. Its folder is made where it is missing.
        content: Its content.
        replace: Whether a file that is there is replaced.
        folder: Folder for the temporary file, on the same file system; when left out, that of the file.

    Raises:
        FileExistsError: If there is a file that is not to be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = (folder or path.parent) / f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.write_bytes(content)
        move_file(temporary, path, replace)
    finally:
        temporary.unlink(missing_ok=True)


def move_file(temporary: Path, target: Path, replace: bool = True) -> None:
    """Make a file durable and give it its name, for good. It may keep the old one besides.

    Of several that must not replace a file one succeeds. A file system without links is asked first for the name.

    Raises:
        FileExistsError: If somebody has the name and is not to be replaced.
    """
    sync_path(temporary)
    try:
        (os.replace if replace else os.link)(temporary, target)
    except OSError:
        if replace:
            raise
        if os.path.lexists(target):
            raise FileExistsError(f"{str(target)!r} exists already.") from None
        os.replace(temporary, target)
    sync_path(target.parent)


def free_disk(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on or will be on."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def gigabytes(size: int) -> str:
    """Return a number of bytes for people, in units of 10^9 bytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


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
            if (free := take_alone(Path(left))) is not None:
                with free:
                    os.unlink(left)
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
    lease = take_free(lock_path)
    if lease is None:
        return False
    with lease:
        shutil.rmtree(parent / name, ignore_errors=True)
        with suppress(OSError):
            lock_path.unlink()
    return True


def publish(staged: Path, target: Path) -> None:
    """Give a finished folder its name on the same file system, once everything in it is on disk."""
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
