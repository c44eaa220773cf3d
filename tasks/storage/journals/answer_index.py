"""An index on disk from prompts to their answers, so that equal prompts are generated once and memory stays flat.

Answers are appended to a file, and a table tells where each lies. Most prompts are new: a filter of fixed size knows
nearly all of them as such, so that the table is asked for few. New answers wait in memory until there are enough to be
entered in the order of the table, which is several times as fast as one by one.
"""

from __future__ import annotations

import marshal
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

from prefect_huggingface.tasks.storage.files import open_scratch_database

QUERY_SIZE = 500
PENDING_ROWS = 8192
FILTER_BITS = 2**25  # 4 MiB: a million prompts with a thousandth of mistakes
FILTER_HASHES = 4

Fields = tuple[Any, ...]


class AnswerIndex:
    """Answers by the hash of their prompt, 16 bytes. It ends with the process, and is for one thread."""

    def __init__(self) -> None:
        self._base = open_scratch_database()
        self._base.execute("CREATE TABLE places (key INTEGER PRIMARY KEY, start INTEGER, size INTEGER)")
        self._file = tempfile.TemporaryFile(buffering=0)
        self._size = 0
        self._pending: dict[bytes, Fields] = {}
        self._filter = _Filter()

    def add(self, answers: Iterable[tuple[Any, ...]]) -> None:
        """Remember answers: (digest, *fields of `Answer` from `text` to `details`). Known digests are kept."""
        for digest, *fields in answers:
            self._pending.setdefault(digest, tuple(fields))
        if len(self._pending) >= PENDING_ROWS:
            self._flush()

    def find(self, digests: Sequence[bytes]) -> dict[bytes, Fields]:
        """Return the fields of the answers that are known, by digest."""
        found = {digest: self._pending[digest] for digest in digests if digest in self._pending}
        for start, size in self._places(sorted(set(self._filter.pick(digests)))):
            # What was answered first is kept. The record may be of another prompt with the same key.
            digest, fields = marshal.loads(os.pread(self._file.fileno(), size, start))
            found[digest] = fields
        return found

    def close(self) -> None:
        """Delete the index."""
        self._base.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _places(self, keys: Sequence[int]) -> Iterator[tuple[int, int]]:
        for first in range(0, len(keys), QUERY_SIZE):
            some = keys[first : first + QUERY_SIZE]
            marks = ",".join("?" * len(some))
            yield from self._base.execute(f"SELECT start, size FROM places WHERE key IN ({marks})", some)

    def _flush(self) -> None:
        """Write what waits. Of two digests with the same key the second is forgotten, and its prompt asked anew."""
        pending, self._pending = self._pending, {}
        records, places = [], []
        for key, item in zip(self._filter.add(list(pending)), pending.items(), strict=True):
            record = marshal.dumps(item)
            records.append(record)
            places.append((key, self._size, len(record)))
            self._size += len(record)
        content = memoryview(b"".join(records))
        while content:
            content = content[self._file.write(content) :]
        self._base.execute("BEGIN")
        self._base.executemany("INSERT OR IGNORE INTO places VALUES (?,?,?)", sorted(places))
        self._base.execute("COMMIT")


class _Filter:
    """Tells of most digests that they were never added. It may err for a digest that is new, never for one it has."""

    def __init__(self) -> None:
        import numpy as np

        self._bits = np.zeros(FILTER_BITS // 8, np.uint8)

    def add(self, digests: Sequence[bytes]) -> list[int]:
        """Add digests and return the key of each: its first eight bytes as a number."""
        import numpy as np

        halves = _halves(digests)
        for place, bit in _positions(halves):
            np.bitwise_or.at(self._bits, place, bit)
        keys: list[int] = halves[:, 0].view(np.int64).tolist()
        return keys

    def pick(self, digests: Sequence[bytes]) -> list[int]:
        """Return the keys of the digests that may have been added."""
        import numpy as np

        halves = _halves(digests)
        known = np.ones(len(halves), bool)
        for place, bit in _positions(halves):
            known &= (self._bits[place] & bit) != 0
        keys: list[int] = halves[known, 0].view(np.int64).tolist()
        return keys


def _halves(digests: Sequence[bytes]) -> Any:
    import numpy as np

    return np.ascontiguousarray(np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2))


def _positions(halves: Any) -> Iterator[tuple[Any, Any]]:
    """Yield for each hash the byte and the bit of every digest."""
    import numpy as np

    for number in range(FILTER_HASHES):
        position = (halves[:, 0] + np.uint64(number) * halves[:, 1]) & np.uint64(FILTER_BITS - 1)
        yield position >> np.uint64(3), np.uint8(1) << (position & np.uint64(7)).astype(np.uint8)
