"""Manifests: the proof that a snapshot is complete. A snapshot is never complete because its folder exists."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect_huggingface.tasks.records import Snapshot, SnapshotFile
from prefect_huggingface.tasks.storage.hub.contents import has_content
from prefect_huggingface.tasks.storage.hub.layout import RepositoryFolder
from prefect_huggingface.tasks.storage.leases import note_use

FORMAT = 1


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One verified file, with the time of its last change (ns) when it was verified."""

    path: str
    size: int
    blob_name: str
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """All files of a selection at a commit. It holds no address and no secret."""

    repo_id: str
    commit: str
    key: str
    files: tuple[ManifestFile, ...]
    gated: str | None = None
    licence: str | None = None

    def snapshot(self, folder: RepositoryFolder) -> Snapshot:
        """Return the snapshot that the manifest describes."""
        files = tuple(
            SnapshotFile(
                path=file.path,
                size=file.size,
                sha256=file.blob_name if len(file.blob_name) == 64 else None,
                git_sha1=file.blob_name if len(file.blob_name) == 40 else None,
            )
            for file in self.files
        )
        return Snapshot(self.repo_id, self.commit, folder.snapshot(self.commit), files)


def write_manifest(folder: RepositoryFolder, manifest: Manifest) -> None:
    """Publish a manifest. From then on its snapshot is complete."""
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1)
    folder.write(folder.manifest(manifest.commit, manifest.key), text)


def read_manifest(place: Path) -> Manifest | None:
    """Return the manifest at a place, or None if there is none that can be read."""
    try:
        values: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            return None
        return Manifest(**{**values, "files": tuple(ManifestFile(**file) for file in values["files"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def find_complete(folder: RepositoryFolder, commit: str, key: str) -> Manifest | None:
    """Return the manifest of a selection if each of its files is there unchanged, and note that it was used."""
    place = folder.manifest(commit, key)
    manifest = read_manifest(place)
    if manifest is None or manifest.commit != commit or not manifest.files:
        return None
    touched = [_check(folder.snapshot(commit) / file.path, file) for file in manifest.files]
    if "wrong" in touched:
        return None
    with suppress(OSError):
        # A store that is only readable is good enough to read from.
        if "touched" in touched:
            write_manifest(folder, _renew(folder, manifest))
    note_use(folder.snapshot(commit))
    return manifest


def _check(place: Path, file: ManifestFile) -> str:
    try:
        found = place.stat()
    except OSError:
        return "wrong"
    if found.st_size != file.size:
        return "wrong"
    if found.st_mtime_ns == file.mtime_ns:
        return "same"
    # Copied or changed since it was verified.
    return "touched" if has_content(place, file.size, file.blob_name) else "wrong"


def _renew(folder: RepositoryFolder, manifest: Manifest) -> Manifest:
    files = tuple(
        ManifestFile(f.path, f.size, f.blob_name, (folder.snapshot(manifest.commit) / f.path).stat().st_mtime_ns)
        for f in manifest.files
    )
    return Manifest(manifest.repo_id, manifest.commit, manifest.key, files, manifest.gated, manifest.licence)


def manifests_of(folder: RepositoryFolder) -> Iterator[Manifest]:
    """Yield all manifests of a repository."""
    for place in sorted((folder.path / "manifests").glob("*.json")):
        manifest = read_manifest(place)
        if manifest is not None:
            yield manifest


def verified_blobs(folder: RepositoryFolder) -> dict[str, int]:
    """Return the time of the last change (ns) of each blob when it was verified."""
    return {file.blob_name: file.mtime_ns for manifest in manifests_of(folder) for file in manifest.files}


def known_commit(folder: RepositoryFolder, revision: str) -> str | None:
    """Return the commit of a branch, a tag or the beginning of a commit as far as this machine knows it."""
    commit = folder.read_reference(revision)
    if commit is not None:
        return commit
    if len(revision) < 7:
        return None
    matching = {manifest.commit for manifest in manifests_of(folder) if manifest.commit.startswith(revision)}
    return matching.pop() if len(matching) == 1 else None
