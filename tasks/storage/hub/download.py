"""Downloads the snapshot of a model: planned first, then what is missing, resumed, verified and published by rename."""

from __future__ import annotations

import contextvars
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import httpx
from prefect.logging import get_logger

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.hub_errors import (
    AccessError,
    CorruptFileError,
    DiskFullError,
    HubError,
    HubUnavailableError,
    OfflineError,
    RequestContext,
    StoreError,
    StoreLimitError,
    UntrustedHubError,
    attempt,
    explain_busy,
    explain_disk,
    explain_status,
)
from prefect_huggingface.tasks.records import Snapshot
from prefect_huggingface.tasks.storage.eviction import make_room
from prefect_huggingface.tasks.storage.files import READ_BYTES, free_disk, has_content, new_hash
from prefect_huggingface.tasks.storage.hub.cache import (
    REPOSITORY_LOCK,
    Manifest,
    RepositoryFolder,
    Selection,
    adopt_snapshot,
    find_complete,
    known_commit,
    make_manifest,
    verified_blobs,
    verify_files,
    works_offline,
    write_manifest,
)
from prefect_huggingface.tasks.storage.hub.client import (
    COMMIT,
    DownloadStopped,
    HubConnection,
    Location,
    Pace,
    RepositoryFile,
    RepositoryState,
    RetryPolicy,
    check_revision,
    resolve,
)
from prefect_huggingface.tasks.storage.hub.progress import BAR_SECONDS, Progress

Access = Literal["open", "granted", "refused", "not asked"]
SPARE_BYTES = 1 << 20
logger = get_logger(__name__)
PARALLEL_FILES = 4
LARGEST_CORRUPT_COUNT = 2
SMALLEST_PROGRESS_BYTES = 1 << 20
"""An attempt that brings less than this, or than 1 % of the file, counts as a failure like one that brings nothing."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file of a plan: size in bytes (None if the Hub does not say) and how many bytes are here already."""

    path: str
    size: int | None
    cached_bytes: int


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """What a download would do.

    Attributes:
        repo_id: Repository.
        revision: Branch, tag or commit that was asked for.
        commit: Commit that it is.
        path: Folder where the snapshot is or will be.
        files: Files that the model needs, in the order of their paths.
        complete: Whether the snapshot is here and verified, so that nothing would be downloaded.
        total_bytes: Size of all files.
        cached_bytes: Bytes that are here already.
        missing_bytes: Bytes to download.
        free_bytes: Free bytes of the disk of the store.
        access: Whether the content may be read: "open" to everybody, "granted" to the token, "refused", or "not asked"
            because the snapshot is here.
        gated: "auto" or "manual" if the licence must be accepted on the Hub, else None.
        licence: Licence that the model card names.
        problem: Sentence that says why the download cannot work and what to do, or None.
    """

    repo_id: str
    revision: str
    commit: str
    path: Path
    files: tuple[PlannedFile, ...]
    complete: bool
    total_bytes: int
    cached_bytes: int
    missing_bytes: int
    free_bytes: int
    access: Access
    gated: str | None = None
    licence: str | None = None
    problem: str | None = None

    @property
    def fits(self) -> bool:
        """Whether there is room for what is missing."""
        return not self.missing_bytes or self.missing_bytes + SPARE_BYTES <= self.free_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-friendly values."""
        return {**asdict(self), "path": str(self.path), "fits": self.fits}


def plan_snapshot(model: LocalModel) -> DownloadPlan:
    """Return what `fetch_snapshot` would do. Nothing is downloaded and nothing is written.

    Raises:
        HubError: If the Hub cannot tell, or there is nothing that could be downloaded.
    """
    revision, folder = check_revision(model.revision, model.model_id), RepositoryFolder.of(model)
    stored = find_stored(model, revision)
    if stored is not None:
        files = tuple(PlannedFile(file.path, file.size, file.size) for file in stored.files)
        return _plan(folder, revision, stored, files, True, "not asked")
    if works_offline(model):
        raise not_here(model, revision)
    with HubConnection(model.get_credentials(), model.model_id) as hub:
        retry = RetryPolicy(hub.attempts, threading.Event())
        state = resolve(hub, revision, retry)
        chosen = choose_files(model, hub, state, retry)
        problem: HubError | None = space_error(model, folder, chosen)
        try:
            access = check_access(hub, state, chosen, retry)
        except AccessError as error:
            access, problem = "refused", error
    files = tuple(PlannedFile(file.path, file.size, bytes_here(folder, file)) for file in chosen)
    complete = find_complete(folder, state.commit, Selection.of(model).key) is not None
    return _plan(folder, revision, state, files, complete, access, problem.message if problem else None)


def _plan(
    folder: RepositoryFolder,
    revision: str,
    source: Manifest | RepositoryState,
    files: tuple[PlannedFile, ...],
    complete: bool,
    access: Access,
    problem: str | None = None,
) -> DownloadPlan:
    total, cached = sum(file.size or 0 for file in files), sum(file.cached_bytes for file in files)
    return DownloadPlan(
        repo_id=folder.repo_id, revision=revision, commit=source.commit, path=folder.snapshot(source.commit),
        files=files, complete=complete, total_bytes=total, cached_bytes=cached, missing_bytes=total - cached,
        free_bytes=free_disk(folder.path), access=access, gated=source.gated, licence=source.licence, problem=problem,
    )  # fmt: skip


def choose_files(
    model: LocalModel, hub: HubConnection, state: RepositoryState, retry: RetryPolicy
) -> tuple[RepositoryFile, ...]:
    """Return the files that a model needs; ask for the index of its weights where their names do not tell them.

    Raises:
        HubError: If there are no weights that the backend can load, or the Hub cannot tell.
    """

    def read(path: str) -> bytes:
        try:
            return retry.call(lambda: hub.read_small(path, state.commit), hub.about(state.commit, path))
        except AccessError:
            return b""

    return Selection.of(model).choose(state.files, read)


def check_access(
    hub: HubConnection, state: RepositoryState, chosen: Sequence[RepositoryFile], retry: RetryPolicy
) -> Access:
    """Ask whether the content may be read now, also if it is in the store because somebody else fetched it.

    Raises:
        AccessError: If this user may not read it.
        HubError: If the Hub cannot tell.
    """
    if not state.is_restricted:
        return "open"
    path = chosen[0].path
    retry.call(lambda: hub.locate(path, state.commit), hub.about(state.commit, path))
    return "granted"


def bytes_here(folder: RepositoryFolder, file: RepositoryFile) -> int:
    """Return how many bytes of a file are in the store, complete or not."""
    if file.blob_name is None:
        return 0
    for place in (folder.blob(file.blob_name), folder.partial(file.blob_name)):
        if place.exists():
            return min(place.stat().st_size, file.size or 0)
    return 0


def missing_bytes(folder: RepositoryFolder, files: Sequence[RepositoryFile]) -> int:
    """Return how many bytes of the files are not in the store yet."""
    return sum((file.size or 0) - bytes_here(folder, file) for file in files)


def space_error(model: LocalModel, folder: RepositoryFolder, files: Sequence[RepositoryFile]) -> StoreError | None:
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
    missing, free = missing_bytes(folder, files), free_disk(folder.path)
    if missing and missing + SPARE_BYTES > free:
        text = (
            f"{folder.repo_id!r} needs {missing / 1e9:.3f} GB more than is here, and {free / 1e9:.3f} GB are free in "
            f"{str(folder.root)!r}. Make room, or choose another folder in the block's store."
        )
        return DiskFullError(text, needed_bytes=missing, free_bytes=free, **fields)
    return None


def fetch_snapshot(model: LocalModel, progress: Progress | None = None) -> Snapshot:
    """Return the complete and verified snapshot of a model on the Hub; download what is missing.

    A snapshot that is pinned to a full commit and complete needs no network. With `offline` set, a branch or tag means
    the commit that it was at the last download.

    Args:
        model: Model with a Hub id, its revision, credentials and store.
        progress: Counter of bytes. When left out, it is shown in the terminal and in the Prefect run, where there are.

    Returns:
        Snapshot in the store, with size and hash of each file.

    Raises:
        HubError: If it cannot be had. The kinds are in `hub_errors`.
    """
    revision = check_revision(model.revision, model.model_id)
    manifest = find_stored(model, revision)
    if manifest is None:
        if works_offline(model):
            raise not_here(model, revision)
        with HubConnection(model.get_credentials(), model.model_id) as hub, _disk_errors(hub.about(revision)):
            manifest = _fetch(model, hub, revision, progress)
    return manifest.snapshot(RepositoryFolder.of(model))


def find_stored(model: LocalModel, revision: str) -> Manifest | None:
    """Return the manifest of a snapshot that is complete if the Hub need not be asked which commit it is.

    Offline, what another tool has downloaded is verified once and used.
    """
    folder, selection = RepositoryFolder.of(model), Selection.of(model)
    pinned, offline = COMMIT.fullmatch(revision) is not None, works_offline(model)
    if not pinned and not offline:
        return None
    commit = revision if pinned else known_commit(folder, revision)
    if commit is None or not COMMIT.fullmatch(commit):
        return None
    manifest = find_complete(folder, commit, selection.key)
    if manifest is None and offline:
        manifest = adopt_snapshot(folder, commit, selection)
    if manifest is not None and not pinned:
        logger.info("Use %s offline: revision %s was commit %s here.", model.model_id, revision, commit)
    return manifest


def not_here(model: LocalModel, revision: str) -> OfflineError:
    """Return the error for a model that is not complete in the store and must not be asked for."""
    root = str(RepositoryFolder.of(model).root)
    switch, remedy = "`offline`", "Download it once without `offline`."
    if not model.offline:
        switch, remedy = "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE)", "Unset it and download the model once."
    return OfflineError(
        f"{model.model_id!r} at {revision!r} is not complete in {root!r} and {switch} is set. {remedy}",
        repo_id=model.model_id,
        revision=revision,
    )


@contextmanager
def _disk_errors(about: RequestContext) -> Iterator[None]:
    problem: HubError | None = None
    try:
        yield
    except OSError as exc:
        problem = explain_disk(exc, about)
    if problem is not None:
        raise problem


def _fetch(model: LocalModel, hub: HubConnection, revision: str, progress: Progress | None) -> Manifest:
    """Return the manifest of the snapshot that a revision is now, and note which commit that was."""
    folder, key, store = RepositoryFolder.of(model), Selection.of(model).key, model.get_store()
    if not folder.path.exists():
        folder.check_writable()
    retry = RetryPolicy(hub.attempts, threading.Event())
    state = resolve(hub, revision, retry)
    chosen = choose_files(model, hub, state, retry)
    check_access(hub, state, chosen, retry)
    manifest = find_complete(folder, state.commit, key)
    if manifest is None and not folder.is_writable:
        manifest = verify_files(folder, state.commit, key, chosen, gated=state.gated, licence=state.licence)
    if manifest is None:
        folder.check_writable()
        shortage = space_error(model, folder, chosen)
        if shortage is None or isinstance(shortage, DiskFullError):
            make_room(store, folder.snapshot(state.commit), missing_bytes(folder, chosen))
            shortage = shortage and space_error(model, folder, chosen)
        if shortage is not None:
            raise shortage
        with folder.lock(REPOSITORY_LOCK, store.lock_timeout_seconds):
            # Another process may have fetched it meanwhile.
            manifest = find_complete(folder, state.commit, key)
            if manifest is None:
                progress = progress or Progress(f"Download {model.model_id}")
                transfer = Transfer(hub, folder, state.commit, progress, store.lock_timeout_seconds)
                manifest = _download(transfer, state, key, chosen)
    if not COMMIT.fullmatch(revision) and not state.commit.startswith(revision) and folder.is_writable:
        folder.write(folder.reference(revision), state.commit)
    return manifest


def _download(transfer: Transfer, state: RepositoryState, key: str, chosen: Sequence[RepositoryFile]) -> Manifest:
    """Fetch the files, make them a snapshot and say that it is complete."""
    started, folder = time.monotonic(), transfer.folder
    folder.make(state.commit)
    files = transfer.fetch_all(chosen)
    for file in files:
        folder.link(state.commit, file.path, str(file.blob_name))
    manifest = make_manifest(folder, state.commit, key, files, gated=state.gated, licence=state.licence)
    write_manifest(folder, manifest)
    size, seconds = sum(file.size for file in manifest.files) / 1e6, time.monotonic() - started
    text = "Fetched %s at %s: %d files, %.1f MB, in %.1f s."
    logger.info(text, folder.repo_id, state.commit, len(files), size, seconds)
    return manifest


class Transfer:
    """The download of files of a commit, several side by side.

    Args:
        hub: Connection to the Hub.
        folder: Folder of the repository.
        commit: Commit that the files are of.
        progress: Told about each byte.
        lock_timeout_seconds: How long another process may take for the same content.
    """

    def __init__(
        self, hub: HubConnection, folder: RepositoryFolder, commit: str, progress: Progress, lock_timeout_seconds: float
    ) -> None:
        self.hub, self.folder, self.commit, self.progress = hub, folder, commit, progress
        self.lock_timeout_seconds = lock_timeout_seconds
        self.stop = threading.Event()
        self.verified = verified_blobs(folder)

    def fetch_all(self, chosen: Sequence[RepositoryFile]) -> list[RepositoryFile]:
        """Fetch files, and return them with their sizes and hashes. The first failure stops the others.

        What they have got stays.
        """
        self.progress.total = sum(file.size or 0 for file in chosen)
        # Largest first, so that no large one is left alone at the end.
        order = sorted(chosen, key=lambda file: -(file.size or 0))
        with ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="download") as pool:
            try:
                futures = [pool.submit(contextvars.copy_context().run, self.fetch, file) for file in order]
                pending = set(futures)
                while pending:
                    done, pending = wait(pending, timeout=BAR_SECONDS, return_when=FIRST_EXCEPTION)
                    self.progress.show()
                    for future in done:
                        future.result()
                return [future.result() for future in futures]
            finally:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                self.progress.close()

    def fetch(self, file: RepositoryFile) -> RepositoryFile:
        """Bring the content of a file into the store, and return the file with its size and hash.

        Raises:
            HubError: If it cannot be had.
            DownloadStopped: If the download was stopped.
        """
        whole = self._settle(file)
        name, size = whole.blob_name, whole.size
        assert name is not None
        assert size is not None
        with self.folder.lock(name, self.lock_timeout_seconds, self.stop):
            if self._is_there(name, size):
                with suppress(OSError):  # of another tool's content there is no mark
                    os.utime(self.folder.mark(self.commit, name))
                self.progress.advance(size)
            else:
                with PartialDownload(self.folder.partial(name), name, size) as partial:
                    self.progress.advance(partial.length)
                    self._fill(whole, partial)
                    # First the mark, so that no killed process leaves a content that nobody may remove.
                    self.folder.mark(self.commit, name).touch()
                    partial.publish(self.folder.blob(name))
        return whole

    def _settle(self, file: RepositoryFile) -> RepositoryFile:
        """Return the file with its size and hash; ask for them where the list does not have them."""
        if file.blob_name is not None and file.size is not None:
            return file
        retry = RetryPolicy(self.hub.attempts, self.stop)
        found = retry.call(lambda: self._locate(file), self.hub.about(self.commit, file.path))
        return replace(file, size=found.size, blob_name=found.etag)

    def _is_there(self, name: str, size: int) -> bool:
        blob = self.folder.blob(name)
        if not blob.exists():
            return False
        if blob.stat().st_size == size and blob.stat().st_mtime_ns == self.verified.get(name):
            return True
        if has_content(blob, size, name):
            return True
        # Other clients check the size only; nothing may go on using such a content.
        blob.unlink()
        return False

    def _fill(self, file: RepositoryFile, partial: PartialDownload) -> None:
        retry, corrupt = RetryPolicy(self.hub.attempts, self.stop), 0
        about = self.hub.about(self.commit, file.path)
        enough = max(SMALLEST_PROGRESS_BYTES, partial.size // 100)
        while not partial.is_right:
            if partial.is_full:
                self._forget(partial)
                corrupt += 1
                if corrupt == LARGEST_CORRUPT_COUNT:
                    text = (
                        f"{file.path!r} of {self.hub.repo_id!r} does not have its hash, twice. Use another Hub address."
                    )
                    raise CorruptFileError(text, **about.fields())
            before = partial.length
            problem = attempt(lambda: self._read_on(file, partial), about)
            if partial.length - before >= enough:
                retry.failures = 0
            if problem is None and not partial.is_full:
                text = f"{file.path!r} of {self.hub.repo_id!r} ended early. Try again later."
                problem = HubUnavailableError(text, **about.fields())
            if problem is not None:
                retry.backoff(problem)

    def _forget(self, partial: PartialDownload) -> None:
        self.progress.advance(-partial.length)
        partial.reset()

    def _locate(self, file: RepositoryFile) -> Location:
        location = self.hub.locate(file.path, self.commit)
        if (file.blob_name or location.etag) != location.etag or file.size not in (None, location.size):
            text = f"{self.hub.endpoint!r} contradicts itself about {file.path!r}. Use another Hub address."
            raise UntrustedHubError(text, **self.hub.about(self.commit, file.path).fields())
        return location

    def _read_on(self, file: RepositoryFile, partial: PartialDownload) -> None:
        """Append what is missing, from an address that is asked for anew, as signed ones expire."""
        if partial.is_full:
            return
        location, pace = self._locate(file), Pace(self.hub.timeout)
        with self.hub.read(location, partial.length) as response:
            self._check_answer(response, location, file, partial)
            # Not in blocks of a fixed size: what has arrived before a cut must not be lost.
            for block in response.iter_raw():
                # More than was announced is wrong from some byte on, so that the hash of the whole decides.
                kept = block[: partial.size - partial.length]
                partial.append(kept)
                self.progress.advance(len(kept))
                if self.stop.is_set():
                    raise DownloadStopped
                if pace.is_too_slow(len(block)):
                    text = f"{file.path!r} of {self.hub.repo_id!r} comes too slowly. Try again later."
                    raise HubUnavailableError(text, **self.hub.about(self.commit, file.path).fields())

    def _check_answer(
        self, response: httpx.Response, location: Location, file: RepositoryFile, partial: PartialDownload
    ) -> None:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        fits = match is not None and int(match[1]) == partial.length and match[2] in ("*", str(partial.size))
        if response.status_code == 206 and fits:
            return
        if response.status_code in (200, 206, 416):
            # The server sends another part than was asked for; only the whole is of use then.
            self._forget(partial)
        if response.status_code != 200:
            raise self._refusal(response, location, file)

    def _refusal(self, response: httpx.Response, location: Location, file: RepositoryFile) -> HubError:
        about, status = self.hub.about(self.commit, file.path), response.status_code
        if status in (408, 429) or status >= 500:
            return explain_busy(status, response.headers, about)
        if self.hub.is_own(location.url) and status not in (206, 416):
            return explain_status(status, response.headers, about)
        # Most likely the signed address has expired; the next attempt asks for another one.
        text = f"The storage of {self.hub.endpoint!r} refuses {file.path!r} with status {status}. Try again later."
        return HubUnavailableError(text, **about.fields(status=status))


class PartialDownload:
    """A content that is not complete yet. It stays on disk and is continued, by this process or by another one.

    The hash is taken while the bytes come in. Use it as a context manager, under the lock of the blob.

    Args:
        place: File that grows. What it holds already is read once for the hash.
        name: Hash that the whole content must have.
        size: Size of the whole content in bytes.

    Raises:
        OSError: If the file cannot be read or written.
    """

    def __init__(self, place: Path, name: str, size: int) -> None:
        self.place, self.name, self.size = place, name, size
        self.length = 0
        # Unbuffered, so that a killed process loses as little as possible.
        place.touch()
        self._file = place.open("r+b", buffering=0)
        self._hash = new_hash(name, size)
        if os.fstat(self._file.fileno()).st_size > size:
            self.reset()
        while block := self._file.read(READ_BYTES):
            self._hash.update(block)
            self.length += len(block)

    def __enter__(self) -> PartialDownload:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def is_full(self) -> bool:
        """Whether all bytes are there."""
        return self.length == self.size

    @property
    def is_right(self) -> bool:
        """Whether the bytes have the hash that they must have."""
        return self.is_full and self._hash.hexdigest() == self.name

    def append(self, block: bytes) -> None:
        """Add bytes at the end."""
        view = memoryview(block)
        while view:
            written = self._file.write(view)
            self._hash.update(view[:written])
            self.length += written
            view = view[written:]

    def reset(self) -> None:
        """Throw all bytes away."""
        self._file.seek(0)
        self._file.truncate()
        self._hash, self.length = new_hash(self.name, self.size), 0

    def publish(self, target: Path) -> None:
        """Make the content the blob `target` in one step, after the disk has it."""
        os.fsync(self._file.fileno())
        self._file.close()  # Windows renames no open file
        os.replace(self.place, target)
