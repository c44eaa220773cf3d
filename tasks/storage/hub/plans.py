"""What a download would do, asked for before it is done."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.hub_errors import AccessError, HubError
from prefect_huggingface.tasks.records import Snapshot
from prefect_huggingface.tasks.storage.hub.connections import HubConnection
from prefect_huggingface.tasks.storage.hub.explanations import attempt
from prefect_huggingface.tasks.storage.hub.fetching import find_stored, not_here
from prefect_huggingface.tasks.storage.hub.layout import RepositoryFolder
from prefect_huggingface.tasks.storage.hub.manifests import find_complete, read_manifest
from prefect_huggingface.tasks.storage.hub.patience import Patience
from prefect_huggingface.tasks.storage.hub.revisions import RepositoryFile, RepositoryState, check_revision, resolve
from prefect_huggingface.tasks.storage.hub.rooms import SPARE_BYTES, bytes_here, find_lack, free_bytes
from prefect_huggingface.tasks.storage.hub.selections import Selection

Access = Literal["open", "granted", "refused", "not asked"]


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
    if model.offline:
        raise not_here(model, revision)
    with HubConnection(model.get_credentials(), model.model_id) as hub:
        patience = Patience(hub.attempts, threading.Event())
        state = resolve(hub, revision, patience)
        chosen = Selection.of(model).choose(state.files)
        return _plan_download(model, hub, revision, state, chosen)


def _plan_stored(model: LocalModel, revision: str, stored: Snapshot) -> DownloadPlan:
    folder = RepositoryFolder.of(model)
    manifest = read_manifest(folder.manifest(stored.commit, Selection.of(model).key))
    size = sum(file.size for file in stored.files)
    return DownloadPlan(
        repo_id=model.model_id, revision=revision, commit=stored.commit, path=stored.path,
        files=tuple(PlannedFile(file.path, file.size, file.size) for file in stored.files),
        complete=True, total_bytes=size, cached_bytes=size, missing_bytes=0, free_bytes=free_bytes(folder),
        access="not asked", gated=manifest.gated if manifest else None, licence=manifest.licence if manifest else None,
    )  # fmt: skip


def _plan_download(
    model: LocalModel, hub: HubConnection, revision: str, state: RepositoryState, chosen: Sequence[RepositoryFile]
) -> DownloadPlan:
    folder = RepositoryFolder.of(model)
    access, refusal = _ask_access(hub, state, chosen, revision)
    files = tuple(PlannedFile(file.path, file.size, bytes_here(folder, file)) for file in chosen)
    total, cached = sum(file.size or 0 for file in files), sum(file.cached_bytes for file in files)
    lack = find_lack(model, folder, chosen)
    problem = refusal or (lack.message if lack is not None else None)
    return DownloadPlan(
        repo_id=model.model_id, revision=revision, commit=state.commit, path=folder.snapshot(state.commit),
        files=files, complete=find_complete(folder, state.commit, Selection.of(model).key) is not None,
        total_bytes=total, cached_bytes=cached, missing_bytes=total - cached, free_bytes=free_bytes(folder),
        access=access, gated=state.gated, licence=state.licence, problem=problem,
    )  # fmt: skip


def _ask_access(
    hub: HubConnection, state: RepositoryState, chosen: Sequence[RepositoryFile], revision: str
) -> tuple[Access, str | None]:
    """Return who may read the content, and the sentence of the refusal if this user may not."""
    if not state.is_restricted:
        return "open", None
    about = hub.about(revision)
    patience = Patience(hub.attempts, threading.Event())
    answer = attempt(lambda: patience.insist(lambda: hub.locate(chosen[0].path, state.commit), about), about)
    if isinstance(answer, AccessError):
        return "refused", answer.message
    if isinstance(answer, HubError):
        raise answer
    return "granted", None
