"""Writing finished rows to a journal, in a thread of its own so that no engine waits for a disk."""

from __future__ import annotations

import os
import threading
import time
from typing import Any, Self

from prefect_huggingface.tasks.storage.journals.journal import Journal
from prefect_huggingface.tasks.storage.journals.segments import SegmentName

COMMIT_ROWS = 512  # rows that are worth a segment of their own
SHORT_INTERVAL_SECONDS = 0.2  # between two segments when rows come fast
FIRST_INTERVAL_SECONDS = 0.1  # between two segments when rows come slowly, in the beginning ...
REMOTE_INTERVAL_SECONDS = 2.0  # the same where every segment is a request to a remote store
LONG_INTERVAL_SECONDS = 4.0  # ... and in the long run, so that a night makes thousands of segments and not more
BUFFER_ROWS = 32_768  # rows that wait for the disk at most


class JournalWriter:
    """Commits the finished rows of one shard. `add` is for one thread.

    Args:
        journal: Journal to write to.
        job: Key of the job.
        epoch: Number of the run.
    """

    def __init__(self, journal: Journal, job: str, epoch: int) -> None:
        self._journal, self._job, self._epoch = journal, job, epoch
        self._attempt = os.urandom(4).hex()
        self._first_interval = FIRST_INTERVAL_SECONDS if journal.place.is_local else REMOTE_INTERVAL_SECONDS
        self._number = 0
        self._rows: list[tuple[Any, ...]] = []
        self._wake = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._began = self._committed = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="journal-writer", daemon=True)
        self._thread.start()

    def add(self, answers: list[tuple[Any, ...]]) -> None:
        """Take over finished rows, as tuples in the order of `Answer`. They are committed within seconds.

        Raises:
            OSError: What the disk said to an earlier row.
        """
        with self._wake:
            while len(self._rows) > BUFFER_ROWS and self._error is None:
                self._wake.wait()
            self._check()
            self._rows += answers
            if len(self._rows) >= COMMIT_ROWS:
                self._wake.notify_all()

    def close(self) -> None:
        """Commit what is left and end the thread.

        Raises:
            OSError: What the disk said.
        """
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join()
        self._check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while (rows := self._next_rows()) is not None:
                self._commit(rows)
        except BaseException as exc:
            with self._wake:
                self._error = exc
                self._wake.notify_all()

    def _next_rows(self) -> list[tuple[Any, ...]] | None:
        """Wait until rows are due, and return them; None after the last."""
        with self._wake:
            while not self._closed:
                waited = time.monotonic() - self._committed
                due = self._interval()
                if len(self._rows) >= COMMIT_ROWS:
                    due = min(due, max(SHORT_INTERVAL_SECONDS, self._first_interval))
                if self._rows and waited >= due:
                    break
                self._wake.wait(max(due - waited, 0.01) if self._rows else self._interval())
            rows, self._rows = self._rows, []
            self._wake.notify_all()
        return rows or None

    def _interval(self) -> float:
        age = time.monotonic() - self._began
        return min(max(age / 60, self._first_interval), LONG_INTERVAL_SECONDS)

    def _commit(self, rows: list[tuple[Any, ...]]) -> None:
        failed = sum(row[7] is not None for row in rows)
        tokens = sum(row[5] for row in rows if not row[9])
        numbers = [row[0] for row in rows]
        name = SegmentName(
            self._epoch, self._attempt, self._number, min(numbers), max(numbers), len(rows), failed, tokens
        )
        self._journal.append(name, self._job, rows)
        self._number += 1
        self._committed = time.monotonic()
