"""An index on disk from prompts to their results, so that equal prompts are generated once and memory stays flat.

Results lie in a file behind one another. Their keys lie in sorted arrays, each at least twice as long as the next, that
are searched for many prompts at once. (Measured: 100,000 new prompts are looked up and entered in 0.2 seconds of
processor time, SQLite needs 1.1.)
"""

from __future__ import annotations

import marshal
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from typing_extensions import override

from prefect_huggingface.tasks.storage.journals.journal import ResultRow

PENDING_ROWS = 8192


class ResultIndex(AbstractContextManager["ResultIndex"]):
    """Results by the hash of their prompt, 16 bytes. It ends with the process, and is for one thread."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._runs: list[Any] = []  # keys in ascending order, and where the result of each lies
        # Texts of bytes, since Python's search for garbage looks at every tuple that is kept.
        self._pending: dict[bytes, bytes] = {}

    def add(self, rows: Iterable[ResultRow]) -> None:
        """Remember results by their digest. Known digests, and rows without one, are left as they are."""
        for row in rows:
            if row.digest is not None and row.digest not in self._pending:
                self._pending[row.digest] = marshal.dumps(tuple(row))
        if len(self._pending) >= PENDING_ROWS:
            self._flush()

    def find(self, digests: Sequence[bytes]) -> dict[bytes, ResultRow]:
        """Return the results that are known, by digest."""
        found = [marshal.loads(self._pending[digest]) for digest in digests if digest in self._pending]
        for place in self._places(digests) if self._runs and digests else ():
            self._file.seek(place)
            found.append(marshal.load(self._file))
        # The first of a digest comes last. A result may be of another prompt with the same key.
        return {row.digest: row for row in (ResultRow(*values) for values in found) if row.digest}

    @override
    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _places(self, digests: Sequence[bytes]) -> list[int]:
        """Return in descending order where results with the keys of some digests lie."""
        import numpy as np

        wanted = _keys(digests)
        places: set[int] = set()
        for keys, starts in self._runs:
            nearest = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            places.update(starts[nearest[keys[nearest] == wanted]].tolist())
        return sorted(places, reverse=True)

    def _flush(self) -> None:
        """Write what waits. Of two digests with the same key the second is forgotten, and its prompt asked anew."""
        import numpy as np

        pending, self._pending = self._pending, {}
        end = self._file.seek(0, 2)
        self._file.write(b"".join(pending.values()))
        sizes = np.fromiter(map(len, pending.values()), np.uint64, len(pending))
        run = np.stack([_keys(list(pending)), np.uint64(end) + np.cumsum(sizes) - sizes])
        while self._runs and self._runs[-1].shape[1] < 2 * run.shape[1]:
            run = np.concatenate([self._runs.pop(), run], axis=1)
        _, first = np.unique(run[0], return_index=True)
        self._runs.append(_on_disk(run[:, first]))


def _keys(digests: Sequence[bytes]) -> Any:
    """Return the first eight bytes of each digest as a number."""
    import numpy as np

    return np.frombuffer(b"".join(digests), np.uint64)[::2]


def _on_disk(array: Any) -> Any:
    """Return an array whose content the system may take out of memory. Its file has no name, so it ends with it."""
    import numpy as np

    with tempfile.TemporaryFile() as file:
        file.write(array.tobytes())
        file.flush()
        return np.memmap(file, array.dtype, mode="r", shape=array.shape)
