"""Watching a batch through the names of its journal's segments, wherever its shards run."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from prefect_huggingface.tasks.storage.journals.journal import Journal

RATE_SECONDS = 30.0  # span over which the current rate is measured
MAX_SAMPLES = 120  # points of the throughput over time


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch is.

    Attributes:
        rows: Number of rows of the batch.
        finished: Number of rows that are committed, by this run or an earlier one.
        resumed: Number of those that an earlier run had committed.
        failed: Number of committed rows that failed.
        tokens: Number of tokens that this run has generated and committed.
        seconds: Time since the run began.
        rows_per_second: Current rate.
        tokens_per_second: Current rate.
    """

    rows: int
    finished: int
    resumed: int
    failed: int
    tokens: int
    seconds: float
    rows_per_second: float
    tokens_per_second: float

    @property
    def share(self) -> float:
        """Share of the rows that are finished, from 0 to 1."""
        return min(self.finished / self.rows, 1.0) if self.rows else 1.0

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the time that is left, or None while nothing is known."""
        left = max(self.rows - self.finished, 0)
        return left / self.rows_per_second if self.rows_per_second else None


class BatchMonitor:
    """Measures the progress of a batch.

    Args:
        journal: Journal of the batch.
        rows: Number of rows of the batch.
        finished: Number of rows that were committed before.
    """

    def __init__(self, journal: Journal, rows: int, finished: int = 0) -> None:
        self._journal, self._rows = journal, rows
        counts = journal.count()
        # When failed rows are retried, the journal holds what is to be replaced, too.
        self._surplus = counts.rows - finished
        self._replaced_failures = counts.failed if self._surplus else 0
        self._resumed, self._old_tokens = finished, counts.tokens
        self._began = time.monotonic()
        self._recent: deque[tuple[float, int, int]] = deque([(0.0, finished, 0)])
        self.samples: list[tuple[float, int]] = [(0.0, finished)]
        self._sample_seconds = 1.0

    def measure(self) -> Progress:
        """Look at the journal and return the progress."""
        counts = self._journal.count()
        now = time.monotonic() - self._began
        finished, tokens = counts.rows - self._surplus, counts.tokens - self._old_tokens
        self._recent.append((now, finished, tokens))
        while len(self._recent) > 2 and now - self._recent[0][0] > RATE_SECONDS:
            self._recent.popleft()
        self._keep_sample(now, finished)
        then, old_finished, old_tokens = self._recent[0]
        span = max(now - then, 1e-6)
        return Progress(
            self._rows, finished, self._resumed, counts.failed - self._replaced_failures, tokens, now,
            (finished - old_finished) / span, (tokens - old_tokens) / span,
        )  # fmt: skip

    def _keep_sample(self, now: float, finished: int) -> None:
        if now - self.samples[-1][0] >= self._sample_seconds:
            self.samples.append((now, finished))
        if len(self.samples) > MAX_SAMPLES:
            self.samples = self.samples[::2]
            self._sample_seconds *= 2
