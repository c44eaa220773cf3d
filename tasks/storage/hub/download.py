"""Downloads the snapshot of a model: planned first, then what is missing, resumed, verified and published by rename."""

from __future__ import annotations

import contextvars
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
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
    StoreError,
    StoreLimitError,
    UntrustedHubError,
    attempt,
    explain_busy,
    explain_disk,
    explain_status,
)
from prefect_huggingface.tasks.records import Snapshot
from prefect_huggingface.tasks.storage.eviction import evict
from prefect_huggingface.tasks.storage.files import READ_BYTES, free_disk, has_content, new_hash
from prefect_huggingface.tasks.storage.hub.cache import (
    REPOSITORY_LOCK,
    Manifest,
    ManifestFile,
    RepositoryFolder,
    Selection,
    adopt_snapshot,
    find_complete,
    known_commit,
    read_manifest,
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
    revision = check_revision(model.revision, model.model_id)
    stored = find_stored(model, revision)
    if stored is not None:
        return _plan_stored(model, revision, stored)
    if works_offline(model):
        raise not_here(model, revision)
    with HubConnection(model.get_credentials(), model.model_id) as hub:
        retry = RetryPolicy(hub.attempts, threading.Event())
        state = resolve(hub, revision, retry)
        chosen = choose_files(model, hub, state, retry)
        return _plan_download(model, hub, revision, state, chosen)


def choose_files(
    model: LocalModel, hub: HubConnection, state: RepositoryState, retry: RetryPolicy
) -> tuple[RepositoryFile, ...]:
    """Return the files that a model needs; ask for the index of its weights where their names do not tell them.

    Raises:
        HubError: If there are no weights that the backend can load, or the Hub cannot tell.
    """

    def read(path: str) -> bytes:
        about = hub.about(state.commit, path)
        answer = attempt(lambda: retry.call(lambda: hub.read_small(path, state.commit), about), about)
        if isinstance(answer, AccessError):
            return b""
        if isinstance(answer, HubError):
            raise answer
        return answer

    return Selection.of(model).choose(state.files, read)


def _plan_stored(model: LocalModel, revision: str, stored: Snapshot) -> DownloadPlan:
    folder = RepositoryFolder.of(model)
    manifest = read_manifest(folder.manifest(stored.commit, Selection.of(model).key))
    size = sum(file.size for file in stored.files)
    return DownloadPlan(
        repo_id=model.model_id, revision=revision, commit=stored.commit, path=stored.path,
        files=tuple(PlannedFile(file.path, file.size, file.size) for file in stored.files),
        complete=True, total_bytes=size, cached_bytes=size, missing_bytes=0, free_bytes=free_disk(folder.path),
        access="not asked", gated=manifest.gated if manifest else None, licence=manifest.licence if manifest else None,
    )  # fmt: skip


def _plan_download(
    model: LocalModel, hub: HubConnection, revision: str, state: RepositoryState, chosen: Sequence[RepositoryFile]
) -> DownloadPlan:
    folder = RepositoryFolder.of(model)
    access, refusal = _ask_access(hub, state, chosen, revision)
    files = tuple(PlannedFile(file.path, file.size, bytes_here(folder, file)) for file in chosen)
    total, cached = sum(file.size or 0 for file in files), sum(file.cached_bytes for file in files)
    shortage = space_error(model, folder, chosen)
    problem = refusal or (shortage.message if shortage is not None else None)
    return DownloadPlan(
        repo_id=model.model_id, revision=revision, commit=state.commit, path=folder.snapshot(state.commit),
        files=files, complete=find_complete(folder, state.commit, Selection.of(model).key) is not None,
        total_bytes=total, cached_bytes=cached, missing_bytes=total - cached, free_bytes=free_disk(folder.path),
        access=access, gated=state.gated, licence=state.licence, problem=problem,
    )  # fmt: skip


def _ask_access(
    hub: HubConnection, state: RepositoryState, chosen: Sequence[RepositoryFile], revision: str
) -> tuple[Access, str | None]:
    """Return who may read the content, and the sentence of the refusal if this user may not."""
    if not state.is_restricted:
        return "open", None
    about = hub.about(revision)
    retry = RetryPolicy(hub.attempts, threading.Event())
    answer = attempt(lambda: retry.call(lambda: hub.locate(chosen[0].path, state.commit), about), about)
    if isinstance(answer, AccessError):
        return "refused", answer.message
    if isinstance(answer, HubError):
        raise answer
    return "granted", None


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


def make_room(model: LocalModel, folder: RepositoryFolder, commit: str, files: Sequence[RepositoryFile]) -> None:
    """Remove what was used least recently, so that the store keeps to its limit with the files that come.

    Nothing is removed if the store has no limit. What is in use stays.

    Raises:
        StoreError: If the files cannot fit.
    """
    limit = model.get_store().max_size_gb
    if limit is not None and space_error(model, folder, files) is None:
        room = int(limit * 1e9) - missing_bytes(folder, files)
        report = evict(model.get_store(), room, keep=[folder.snapshot(commit)])
        for entry in report.removed:
            logger.info("Removed %s %s (%.3f GB) from the store.", entry.kind, entry.name, entry.size_bytes / 1e9)
        if report.kept_bytes > room:
            logger.warning("The store will hold more than its %g GB, because the rest of it is in use.", limit)
    shortage = space_error(model, folder, files)
    if shortage is not None:
        raise shortage


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
    stored = find_stored(model, revision)
    if stored is not None:
        return stored
    if works_offline(model):
        raise not_here(model, revision)
    return _Fetch(model, revision, progress).run()


def find_stored(model: LocalModel, revision: str) -> Snapshot | None:
    """Return the snapshot if it is complete and the Hub need not be asked which commit it is.

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
    if manifest is None:
        return None
    if not pinned:
        logger.info("Use %s offline: revision %s was commit %s here.", model.model_id, revision, commit)
    return manifest.snapshot(folder)


def not_here(model: LocalModel, revision: str) -> OfflineError:
    """Return the error for a model that is not complete in the store and must not be asked for."""
    root = str(RepositoryFolder.of(model).root)
    switch, remedy = "`offline`", "Download it once without `offline`."
    if not model.offline:
        switch, remedy = "HF_HUB_OFFLINE", "Unset it and download the model once."
    return OfflineError(
        f"{model.model_id!r} at {revision!r} is not complete in {root!r} and {switch} is set. {remedy}",
        repo_id=model.model_id,
        revision=revision,
    )


class _Fetch:
    """One call of `fetch_snapshot` that has to ask the Hub."""

    def __init__(self, model: LocalModel, revision: str, progress: Progress | None) -> None:
        self.model, self.revision = model, revision
        self.folder, self.selection = RepositoryFolder.of(model), Selection.of(model)
        self.progress = progress
        self.stop = threading.Event()
        self.lock_timeout = model.get_store().lock_timeout_seconds

    def run(self) -> Snapshot:
        with HubConnection(self.model.get_credentials(), self.model.model_id) as hub, self._disk_errors(hub):
            if not self.folder.path.exists():
                self.folder.check_writable()
            state = resolve(hub, self.revision, RetryPolicy(hub.attempts, self.stop))
            chosen = choose_files(self.model, hub, state, RetryPolicy(hub.attempts, self.stop))
            if state.is_restricted:
                self._check_access(hub, state, chosen)
            manifest = find_complete(self.folder, state.commit, self.selection.key)
            if manifest is None and not self.folder.is_writable:
                facts = {"gated": state.gated, "licence": state.licence}
                manifest = verify_files(self.folder, state.commit, self.selection.key, chosen, **facts)
            if manifest is None:
                self.folder.check_writable()
                make_room(self.model, self.folder, state.commit, chosen)
                with self.folder.lock(REPOSITORY_LOCK, self.lock_timeout):
                    # Another process may have fetched it meanwhile.
                    manifest = find_complete(self.folder, state.commit, self.selection.key)
                    manifest = manifest or self._download(hub, state, chosen)
            is_name = not COMMIT.fullmatch(self.revision) and not state.commit.startswith(self.revision)
            if is_name and self.folder.is_writable:
                self.folder.write(self.folder.reference(self.revision), state.commit)
            return manifest.snapshot(self.folder)

    @contextmanager
    def _disk_errors(self, hub: HubConnection) -> Iterator[None]:
        problem: HubError | None = None
        try:
            yield
        except OSError as exc:
            problem = explain_disk(exc, hub.about(self.revision))
        if problem is not None:
            raise problem

    def _check_access(self, hub: HubConnection, state: RepositoryState, chosen: Sequence[RepositoryFile]) -> None:
        """Ask whether the content may be read now, also if it is in the store because somebody else fetched it."""
        about = hub.about(self.revision)
        retry = RetryPolicy(hub.attempts, self.stop)
        retry.call(lambda: hub.locate(chosen[0].path, state.commit), about)

    def _download(self, hub: HubConnection, state: RepositoryState, chosen: Sequence[RepositoryFile]) -> Manifest:
        started = time.monotonic()
        progress = self.progress or Progress(f"Download {self.model.model_id}")
        progress.total = sum(file.size or 0 for file in chosen)
        self.folder.make(state.commit)
        transfer = Transfer(hub, self.folder, state.commit, progress, self.stop)
        files = self._fetch_all(transfer, chosen, progress)
        for file in files:
            self.folder.link(state.commit, file.path, str(file.blob_name))
        manifest = self._manifest(state, files)
        write_manifest(self.folder, manifest)
        size, seconds = sum(file.size for file in manifest.files), time.monotonic() - started
        logger.info(
            "Fetched %s at %s: %d files, %.1f MB, in %.1f s.",
            hub.repo_id,
            state.commit,
            len(files),
            size / 1e6,
            seconds,
        )
        return manifest

    def _fetch_all(
        self, transfer: Transfer, chosen: Sequence[RepositoryFile], progress: Progress
    ) -> list[RepositoryFile]:
        """Fetch files side by side. The first failure stops the others; what they have got stays."""
        verified = verified_blobs(self.folder)
        # Largest first, so that no large one is left alone at the end.
        order = sorted(chosen, key=lambda file: -(file.size or 0))
        with ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="download") as pool:
            try:
                pending: set[Future[RepositoryFile]] = {
                    pool.submit(contextvars.copy_context().run, transfer.fetch, file, verified, self.lock_timeout)
                    for file in order
                }
                futures = list(pending)
                while pending:
                    done, pending = wait(pending, timeout=BAR_SECONDS, return_when=FIRST_EXCEPTION)
                    progress.show()
                    for future in done:
                        future.result()
                return [future.result() for future in futures]
            finally:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                progress.close()

    def _manifest(self, state: RepositoryState, files: Sequence[RepositoryFile]) -> Manifest:
        entries = tuple(
            ManifestFile(
                path=file.path,
                size=int(file.size or 0),
                blob_name=str(file.blob_name),
                mtime_ns=(self.folder.snapshot(state.commit) / file.path).stat().st_mtime_ns,
            )
            for file in sorted(files, key=lambda file: file.path)
        )
        return Manifest(
            self.model.model_id, state.commit, self.selection.key, entries, gated=state.gated, licence=state.licence
        )


class Transfer:
    """The download of one file of a commit.

    Args:
        hub: Connection to the Hub.
        folder: Folder of the repository.
        commit: Commit that the file is of.
        progress: Told about each byte.
        stop: Set when the download has failed elsewhere.
    """

    def __init__(
        self, hub: HubConnection, folder: RepositoryFolder, commit: str, progress: Progress, stop: threading.Event
    ) -> None:
        self.hub, self.folder, self.commit, self.progress, self.stop = hub, folder, commit, progress, stop

    def fetch(self, file: RepositoryFile, verified: dict[str, int], lock_timeout_seconds: float) -> RepositoryFile:
        """Bring the content of a file into the store, and return the file with its size and hash.

        Args:
            file: File to fetch.
            verified: Blobs that are known to be right, with the time of their last change (ns).
            lock_timeout_seconds: How long another process may take for the same content.

        Raises:
            HubError: If it cannot be had.
            DownloadStopped: If the download was stopped.
        """
        whole = self._settle(file)
        name, size = whole.blob_name, whole.size
        assert name is not None
        assert size is not None
        with self.folder.lock(name, lock_timeout_seconds, self.stop):
            if self._is_there(name, size, verified):
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
        found = self._retry().call(lambda: self._locate(file), self.hub.about(self.commit, file.path))
        large = len(found.etag) == 64
        return replace(
            file, size=found.size, sha256=found.etag if large else None, git_sha1=None if large else found.etag
        )

    def _retry(self) -> RetryPolicy:
        return RetryPolicy(self.hub.attempts, self.stop)

    def _is_there(self, name: str, size: int, verified: dict[str, int]) -> bool:
        blob = self.folder.blob(name)
        if not blob.exists():
            return False
        if blob.stat().st_size == size and blob.stat().st_mtime_ns == verified.get(name):
            return True
        if has_content(blob, size, name):
            return True
        # Other clients check the size only; nothing may go on using such a content.
        blob.unlink()
        return False

    def _fill(self, file: RepositoryFile, partial: PartialDownload) -> None:
        retry, corrupt = self._retry(), 0
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
                retry.reset()
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
                self._append(block, partial)
                if self.stop.is_set():
                    raise DownloadStopped
                if pace.is_too_slow(len(block)):
                    text = f"{file.path!r} of {self.hub.repo_id!r} comes too slowly. Try again later."
                    raise HubUnavailableError(text, **self.hub.about(self.commit, file.path).fields())

    def _append(self, block: bytes, partial: PartialDownload) -> None:
        room = partial.size - partial.length
        if len(block) > room:
            # More than was announced: wrong from some byte on, so the hash of the whole decides.
            block = block[:room]
        partial.append(block)
        self.progress.advance(len(block))

    def _check_answer(
        self, response: httpx.Response, location: Location, file: RepositoryFile, partial: PartialDownload
    ) -> None:
        if response.status_code == 206 and self._range_fits(response, partial):
            return
        if response.status_code in (200, 206, 416):
            # The server sends another part than was asked for; only the whole is of use then.
            self._forget(partial)
        if response.status_code != 200:
            raise self._refusal(response, location, file)

    @staticmethod
    def _range_fits(response: httpx.Response, partial: PartialDownload) -> bool:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        return match is not None and int(match[1]) == partial.length and match[2] in ("*", str(partial.size))

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
        self._take_up()

    def __enter__(self) -> PartialDownload:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _take_up(self) -> None:
        if os.fstat(self._file.fileno()).st_size > self.size:
            self.reset()
            return
        while block := self._file.read(READ_BYTES):
            self._hash.update(block)
            self.length += len(block)

    @property
    def is_full(self) -> bool:
        """Whether all bytes are there."""
        return self.length == self.size

    @property
    def is_right(self) -> bool:
        """Whether the bytes have the hash that they must have."""
        return self.is_full and self._hash.hexdigest() == self.name

    def append(self, block: bytes) -> None:
        """Add bytes at the end.

        Raises:
            OSError: If the disk is full, for instance.
        """
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
