"""Fetches the snapshot of a model: nothing if it is here, else what is missing, all of it verified."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

from prefect.logging import get_logger

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.hub_errors import HubError, OfflineError
from prefect_huggingface.tasks.records import Snapshot
from prefect_huggingface.tasks.storage.hub.connections import HubConnection
from prefect_huggingface.tasks.storage.hub.explanations import explain_disk
from prefect_huggingface.tasks.storage.hub.layout import REPOSITORY_LOCK, RepositoryFolder
from prefect_huggingface.tasks.storage.hub.manifests import (
    Manifest,
    ManifestFile,
    find_complete,
    known_commit,
    verified_blobs,
    write_manifest,
)
from prefect_huggingface.tasks.storage.hub.patience import Patience
from prefect_huggingface.tasks.storage.hub.progress import BAR_SECONDS, Progress
from prefect_huggingface.tasks.storage.hub.revisions import (
    COMMIT,
    RepositoryFile,
    RepositoryState,
    check_revision,
    resolve,
)
from prefect_huggingface.tasks.storage.hub.rooms import make_room
from prefect_huggingface.tasks.storage.hub.selections import Selection
from prefect_huggingface.tasks.storage.hub.transfers import Transfer

PARALLEL_FILES = 4
logger = get_logger(__name__)


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
    if model.offline:
        raise not_here(model, revision)
    return _Fetch(model, revision, progress).run()


def find_stored(model: LocalModel, revision: str) -> Snapshot | None:
    """Return the snapshot if it is complete and the Hub need not be asked which commit it is."""
    folder = RepositoryFolder.of(model)
    pinned = COMMIT.fullmatch(revision) is not None
    if not pinned and not model.offline:
        return None
    commit = revision if pinned else known_commit(folder, revision)
    if commit is None or not COMMIT.fullmatch(commit):
        return None
    manifest = find_complete(folder, commit, Selection.of(model).key)
    if manifest is None:
        return None
    if not pinned:
        logger.info("Use %s offline: revision %s was commit %s here.", model.model_id, revision, commit)
    return manifest.snapshot(folder)


def not_here(model: LocalModel, revision: str) -> OfflineError:
    """Return the error for a model that is not complete in the store and must not be asked for."""
    return OfflineError(
        f"{model.model_id!r} at {revision!r} is not complete in {str(model.store_path)!r} and `offline` is set. "
        "Download it once without `offline`.",
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
            self.folder.check_writable()
            state = resolve(hub, self.revision, Patience(hub.attempts, self.stop))
            chosen = self.selection.choose(state.files)
            if state.is_restricted:
                self._check_access(hub, state, chosen)
            manifest = find_complete(self.folder, state.commit, self.selection.key)
            if manifest is None:
                make_room(self.model, self.folder, state.commit, chosen)
                with self.folder.lock(REPOSITORY_LOCK, self.lock_timeout):
                    # Another process may have fetched it meanwhile.
                    manifest = find_complete(self.folder, state.commit, self.selection.key)
                    manifest = manifest or self._download(hub, state, chosen)
            if not COMMIT.fullmatch(self.revision) and not state.commit.startswith(self.revision):
                self.folder.write_reference(self.revision, state.commit)
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
        patience = Patience(hub.attempts, self.stop)
        patience.insist(lambda: hub.locate(chosen[0].path, state.commit), about)

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
