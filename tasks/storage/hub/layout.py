"""Where the files of a repository lie: the standard cache layout of Hugging Face, and a few places of our own.

    <store>/hub/models--organisation--name/
        blobs/<hash>                 content of each file, named by its hash
        snapshots/<commit>/<path>    links to the blobs
        refs/<branch or tag>         commit that it was at the last download
        partials/<hash>              content that is not complete yet (ours)
        manifests/<commit>-<key>.json    proof that a snapshot is complete (ours)
    <store>/hub/.locks/models--organisation--name/

A Hub other than the default one gets a folder of its own, `<store>/hub@<host>_<port>`: it could give any content the
name of any commit.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock, Timeout
from prefect.logging import get_logger

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.blocks.credentials import DEFAULT_ENDPOINT
from prefect_huggingface.tasks.hub_errors import StoreBusyError
from prefect_huggingface.tasks.storage.exports.layout import LEASE
from prefect_huggingface.tasks.storage.hub.patience import DownloadStopped

logger = get_logger(__name__)
REPOSITORY_LOCK = "repository"
"""Held while a snapshot is downloaded or removed."""


def hub_folder(store: Path, endpoint: str) -> Path:
    """Return the folder of a store that holds the repositories of a Hub. It is a standard cache folder."""
    if endpoint == DEFAULT_ENDPOINT:
        return store / "hub"
    parts = urlsplit(endpoint)
    name = f"{parts.netloc}{parts.path}" if parts.scheme == "https" else f"{parts.scheme}_{parts.netloc}{parts.path}"
    return store / f"hub@{re.sub(r'[^A-Za-z0-9.-]', '_', name)}"


@dataclass(frozen=True, slots=True)
class RepositoryFolder:
    """The folder of one repository in the cache folder `root`."""

    root: Path
    repo_id: str

    @classmethod
    def of(cls, model: LocalModel) -> RepositoryFolder:
        """Return the folder of a model's repository."""
        return cls(hub_folder(model.store_path, model.get_credentials().endpoint), model.model_id)

    @property
    def path(self) -> Path:
        """Folder of the repository."""
        return self.root / self.name

    @property
    def name(self) -> str:
        """Name of the folder."""
        return "models--" + self.repo_id.replace("/", "--")

    def blob(self, name: str) -> Path:
        """Return the place of a content by its hash."""
        return self.path / "blobs" / name

    def partial(self, name: str) -> Path:
        """Return the place of a content that is not complete yet."""
        return self.path / "partials" / name

    def snapshot(self, commit: str) -> Path:
        """Return the folder of a snapshot."""
        return self.path / "snapshots" / commit

    def reference(self, revision: str) -> Path:
        """Return the file that holds the commit of a branch or tag. The revision is a checked one."""
        return self.path / "refs" / revision

    def manifest(self, commit: str, key: str) -> Path:
        """Return the place of the manifest of a selection of files at a commit."""
        return self.path / "manifests" / f"{commit}-{key}.json"

    def check_writable(self) -> None:
        """Check that the store can be written, before anything is asked of the Hub.

        Raises:
            OSError: If it cannot.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        probe = self.root / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()

    def make(self, commit: str) -> None:
        """Make the folders for a snapshot, and the file by which its users hold it."""
        for name in ("blobs", "partials", "manifests", "refs", f"snapshots/{commit}"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        (self.snapshot(commit) / LEASE).touch()

    @contextmanager
    def lock(self, name: str, timeout_seconds: float, stop: threading.Event | None = None) -> Iterator[None]:
        """Hold the lock of a blob or a snapshot. The standard client uses the same locks for blobs.

        Raises:
            StoreBusyError: If another process holds it for longer than the timeout.
            DownloadStopped: If the download was stopped meanwhile.
        """
        place = self.root / ".locks" / self.name / f"{name}.lock"
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place)
        self._acquire(lock, time.monotonic() + timeout_seconds, timeout_seconds, stop)
        try:
            yield
        finally:
            lock.release()

    def _acquire(self, lock: FileLock, deadline: float, timeout_seconds: float, stop: threading.Event | None) -> None:
        waiting = False
        while True:
            try:
                lock.acquire(timeout=min(1.0, max(0.0, deadline - time.monotonic())))
                return
            except Timeout:
                if stop is not None and stop.is_set():
                    raise DownloadStopped from None
                if not waiting and timeout_seconds:
                    waiting = True
                    logger.info("Wait for another process that downloads %s.", self.repo_id)
                if time.monotonic() >= deadline:
                    raise StoreBusyError(
                        f"Another process has been downloading {self.repo_id!r} for {timeout_seconds:g} seconds. "
                        "Wait for it, or raise the store's `lock_timeout_seconds`.",
                        repo_id=self.repo_id,
                    ) from None

    def link(self, commit: str, path: str, blob_name: str) -> None:
        """Make a content appear as a file of a snapshot, in one step."""
        target = self.snapshot(commit) / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path / "partials" / f".link-{uuid.uuid4().hex}"
        try:
            os.symlink(os.path.relpath(self.blob(blob_name), target.parent), temporary)
        except OSError:
            # Some file systems have no links; the standard client copies there as well.
            shutil.copyfile(self.blob(blob_name), temporary)
        os.replace(temporary, target)

    def write_reference(self, revision: str, commit: str) -> None:
        """Note the commit of a branch or tag."""
        self.write(self.reference(revision), commit)

    def write(self, place: Path, text: str) -> None:
        """Write a small file so that a reader sees the old or the new one, never a part."""
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path / "partials" / f".{place.name}-{uuid.uuid4().hex}"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)

    def read_reference(self, revision: str) -> str | None:
        """Return the commit that a branch or tag was at the last download, or None."""
        try:
            return self.reference(revision).read_text(encoding="utf-8").strip()
        except OSError:
            return None
