"""Repositories of the local Hub: files, commits, branches, tags, and who may read them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

LARGE_SUFFIXES = (".safetensors", ".bin", ".model", ".pt", ".pth", ".gguf", ".onnx")
BLOCK_BYTES = 256 * 1024


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit, in memory or on disk. Large files are served by the CDN, as with Git LFS."""

    content: bytes | Path
    size: int
    sha256: str
    git_sha1: str
    large: bool

    @property
    def etag(self) -> str:
        """Hash that the Hub gives as ETag: sha256 of a large file, git blob sha1 of a small one."""
        return self.sha256 if self.large else self.git_sha1

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` up to `stop` in blocks."""
        if isinstance(self.content, bytes):
            for place in range(start, stop, BLOCK_BYTES):
                yield self.content[place : min(place + BLOCK_BYTES, stop)]
            return
        with self.content.open("rb") as file:
            file.seek(start)
            while start < stop:
                block = file.read(min(BLOCK_BYTES, stop - start))
                start += len(block)
                yield block


def store_file(name: str, content: bytes | Path) -> StoredFile:
    """Hash a file the way the Hub does."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    whole = StoredFile(content, size, "", "", large=False)
    for block in whole.read(0, size):
        sha256.update(block)
        sha1.update(block)
    return StoredFile(content, size, sha256.hexdigest(), sha1.hexdigest(), name.endswith(LARGE_SUFFIXES))


@dataclass
class Repository:
    """One repository with its history: of a model, or of data if its name begins with `datasets/`.

    Attributes:
        name: Id of the repository, `organisation/name`.
        gated: False, "auto" or "manual", as on the Hub.
        private: Whether only `readers` may see that it exists.
        readers: Users that may read the content of a gated or private repository.
        writers: Users that may write to it.
        commits: Files of each commit, by the commit's sha.
        references: Commit of each branch and tag.
        tags: Those references that are tags.
        licence: Licence that the model card names.
        lists_files: Whether the description holds the files; for very large repositories it does not.
        lists_hashes: Whether the file list holds sizes and hashes; some mirrors leave them out.
    """

    name: str
    gated: str | bool = False
    private: bool = False
    readers: set[str] = field(default_factory=set)
    writers: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)
    licence: str = "apache-2.0"
    lists_files: bool = True
    lists_hashes: bool = True

    def commit(self, files: Mapping[str, bytes | Path], branch: str = "main") -> str:
        """Make a commit that holds exactly `files` on a branch, and return its sha."""
        stored = {name: store_file(name, content) for name, content in sorted(files.items())}
        listing = json.dumps([self.name, branch, len(self.commits), [(n, f.sha256) for n, f in stored.items()]])
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[sha] = stored
        self.references[branch] = sha
        return sha

    def tag(self, name: str, commit: str) -> None:
        """Give a commit a name that stays."""
        self.references[name] = commit
        self.tags.add(name)

    def find(self, revision: str) -> str | None:
        """Return the commit of a branch, a tag, a commit or the beginning of one."""
        if revision in self.references:
            return self.references[revision]
        matching = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        return matching[0] if len(matching) == 1 else None

    def describe(self, commit: str, blobs: bool) -> dict[str, object]:
        """Return what the Hub says about the repository at a commit."""
        return {
            "_id": "0" * 24, "id": self.name, "modelId": self.name, "sha": commit, "private": self.private,
            "gated": self.gated, "disabled": False, "downloads": 0, "likes": 0, "library_name": "transformers",
            "tags": [f"license:{self.licence}"], "cardData": {"license": self.licence},
            "siblings": [self._sibling(n, f, blobs) for n, f in self.commits[commit].items() if self.lists_files],
        }  # fmt: skip

    def _sibling(self, name: str, file: StoredFile, blobs: bool) -> dict[str, object]:
        entry: dict[str, object] = {"rfilename": name}
        if blobs and self.lists_hashes:
            entry |= {"size": file.size, "blobId": file.git_sha1}
            if file.large:
                entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
        return entry

    def tree(self, commit: str) -> list[dict[str, object]]:
        """Return the entries of the file tree at a commit."""
        entries: list[dict[str, object]] = []
        for name, file in self.commits[commit].items():
            entry: dict[str, object] = {"type": "file", "oid": file.git_sha1, "size": file.size, "path": name}
            if file.large:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
            entries.append(entry)
        return entries
