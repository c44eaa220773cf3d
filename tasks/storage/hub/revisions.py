"""What a repository holds at a branch, tag or commit: resolved to the commit first, then everything by commit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from prefect_huggingface.tasks.hub_errors import EmptyRepositoryError, RevisionNotFoundError, UntrustedHubError
from prefect_huggingface.tasks.storage.hub.connections import ETAG, HubConnection
from prefect_huggingface.tasks.storage.hub.explanations import Subject
from prefect_huggingface.tasks.storage.hub.patience import Patience

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

COMMIT = re.compile(r"[0-9a-f]{40}")
DEFAULT_REVISION = "main"
LARGEST_PAGE_COUNT = 1000
_FORBIDDEN_IN_REVISION = re.compile(r"[\s\x00-\x1f\x7f\\~^:?*\[]|\.\.|//|@\{")
_UNIMPORTANT = (".gitattributes", ".gitignore", "README.md")


@dataclass(frozen=True, slots=True)
class RepositoryFile:
    """One file as the Hub lists it. Some mirrors leave out size and hash."""

    path: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def blob_name(self) -> str | None:
        """Hash that names the content: sha256 of a large file, git blob sha1 of a small one."""
        return self.sha256 or self.git_sha1


@dataclass(frozen=True, slots=True)
class RepositoryState:
    """What a repository holds at one commit, and who may read it."""

    commit: str
    files: tuple[RepositoryFile, ...]
    gated: str | None = None
    private: bool = False
    licence: str | None = None

    @property
    def is_restricted(self) -> bool:
        """Whether the content is not for everybody."""
        return self.private or self.gated is not None


def check_revision(revision: str | None, repo_id: str) -> str:
    """Return the name of the revision; a missing one means the default branch.

    Raises:
        RevisionNotFoundError: If it cannot be the name of a branch, tag or commit. It becomes part of a path.
    """
    if revision is None:
        return DEFAULT_REVISION
    if not revision or _FORBIDDEN_IN_REVISION.search(revision) or revision.startswith(("/", "-", ".")):
        wrong = True
    else:
        wrong = revision.endswith(("/", ".lock", ".")) or "/." in revision or len(revision) > 200
    if wrong:
        raise RevisionNotFoundError(
            f"`revision` {revision!r} is no name of a branch, tag or commit. Correct it.",
            repo_id=repo_id,
            revision=revision,
        )
    return revision


def resolve(hub: HubConnection, revision: str, patience: Patience) -> RepositoryState:
    """Ask which commit a revision is and what it holds.

    Raises:
        HubError: If the Hub cannot tell, or its answer is unsafe.
    """
    about = hub.about(revision)
    info = patience.insist(lambda: hub.model_info(revision), about)
    commit = info.sha or ""
    if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(revision) and commit != revision):
        text = f"{hub.endpoint!r} names {commit!r} as the commit of {revision!r}. Use another Hub address."
        raise UntrustedHubError(text, **about.fields())
    files = tuple(_listed_files(info)) or tuple(_tree_files(hub, commit, patience))
    for file in files:
        _check_file(file, about)
    if all(file.path in _UNIMPORTANT for file in files):
        text = f"{hub.repo_id!r} holds no files at {revision!r}. Choose another model or revision."
        raise EmptyRepositoryError(text, **about.fields())
    gated = str(info.gated) if info.gated else None
    return RepositoryState(commit, files, gated, bool(info.private), _licence(info))


def _listed_files(info: ModelInfo) -> Iterator[RepositoryFile]:
    for entry in info.siblings or ():
        large = entry.lfs
        yield RepositoryFile(
            path=entry.rfilename,
            size=entry.size,
            sha256=large.sha256 if large else None,
            git_sha1=None if large else entry.blob_id,
        )


def _tree_files(hub: HubConnection, commit: str, patience: Patience) -> Iterator[RepositoryFile]:
    """Yield the files of the tree, for a repository that has too many for a list."""
    address: str | None = None
    for _ in range(LARGEST_PAGE_COUNT):
        entries, following = patience.insist(lambda here=address: hub.tree_page(commit, here), hub.about(commit))  # type: ignore[misc]
        for entry in entries:
            if entry.get("type") == "file":
                yield _tree_file(entry)
        if following is None or not hub.is_own(following):
            return
        address = following


def _tree_file(entry: dict[str, Any]) -> RepositoryFile:
    large = entry.get("lfs") or {}
    return RepositoryFile(
        path=entry["path"],
        size=entry.get("size"),
        sha256=large.get("oid"),
        git_sha1=None if large else entry.get("oid"),
    )


def _check_file(file: RepositoryFile, about: Subject) -> None:
    """Refuse names and hashes that could lead out of the store. Git itself allows none of them."""
    path = file.path
    parts = PurePosixPath(path).parts if isinstance(path, str) else ()
    safe = (
        bool(parts)
        and "/".join(parts) == path
        and ".." not in parts
        and not path.startswith("/")
        and path.isprintable()
        and not re.search(r"[\\:]", path)
        and all(len(part.encode()) <= 255 for part in parts)
    )
    size_is_sane = file.size is None or (isinstance(file.size, int) and file.size >= 0)
    if not safe or not size_is_sane or (file.blob_name is not None and not ETAG.fullmatch(file.blob_name)):
        text = f"{about.endpoint!r} lists a file with an unsafe name or hash: {path!r}. Use another Hub address."
        raise UntrustedHubError(text, **about.fields())


def _licence(info: ModelInfo) -> str | None:
    named = getattr(info.card_data, "license", None)
    if isinstance(named, str):
        return named
    tags = (tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:"))
    return next(tags, None)
