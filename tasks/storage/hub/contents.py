"""Contents by their hash, and the place where one grows until it is complete."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import _Hash

READ_BYTES = 1 << 20


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


class PartialContent:
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

    def __enter__(self) -> PartialContent:
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
