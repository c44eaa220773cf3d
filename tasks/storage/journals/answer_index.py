"""An index on disk from prompts to their answers, so that equal prompts are generated once and memory stays flat."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

QUERY_SIZE = 500


class AnswerIndex:
    """Answers by the hash of their prompt. It lives as long as the process and is for one thread."""

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="prefect-huggingface-answers-")
        self._base = sqlite3.connect(os.path.join(self._folder, "answers.db"), isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "cache_size=-4096"):
            self._base.execute(f"PRAGMA {pragma}")
        self._base.execute(
            "CREATE TABLE answers (digest BLOB PRIMARY KEY, text, status, finish_reason, prompt_tokens, "
            "generated_tokens, seconds, error, details) WITHOUT ROWID"
        )

    def add(self, answers: Iterable[tuple[Any, ...]]) -> None:
        """Remember answers: (digest, *fields of `Answer` from `text` to `details`). Known digests are kept."""
        self._base.execute("BEGIN")
        # Sorted, neighbours in the index are written together.
        rows = sorted(answers, key=_digest)
        self._base.executemany("INSERT OR IGNORE INTO answers VALUES (?,?,?,?,?,?,?,?,?)", rows)
        self._base.execute("COMMIT")

    def find(self, digests: Sequence[bytes]) -> dict[bytes, tuple[Any, ...]]:
        """Return the fields of the answers that are known, by digest."""
        found: dict[bytes, tuple[Any, ...]] = {}
        digests = sorted(digests)
        for start in range(0, len(digests), QUERY_SIZE):
            some = digests[start : start + QUERY_SIZE]
            marks = ",".join("?" * len(some))
            for digest, *fields in self._base.execute(f"SELECT * FROM answers WHERE digest IN ({marks})", some):
                found[digest] = tuple(fields)
        return found

    def close(self) -> None:
        """Delete the index."""
        self._base.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _digest(answer: tuple[Any, ...]) -> bytes:
    digest: bytes = answer[0]
    return digest
