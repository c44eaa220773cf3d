"""One run of a batch: cutting its rows into shards, watching them, and when to give up."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import UUID

from prefect_huggingface.tasks.batching.job import BatchJob, BatchOptions, Commits, check_same_job
from prefect_huggingface.tasks.batching.shard import Shard
from prefect_huggingface.tasks.errors import BatchCancelledError, BatchError
from prefect_huggingface.tasks.storage.journals.journal import Journal, JournalCounts, JournalRows
from prefect_huggingface.tasks.storage.journals.ownership import JournalOwner, StoreOutage, is_held
from prefect_huggingface.tasks.storage.tables.inputs import Rows

LEAST_SHARD_ROWS = 16
LEAST_ROWS_FOR_SHARES = 50
RATE_SECONDS = 30.0  # span over which the current rate is measured
MAX_SAMPLES = 120  # points of the throughput over time
CANCEL_CHECK_SECONDS = 3.0

STATUSES = {
    "ok": "The model ended its answer.",
    "length": "The answer was cut off at `max_new_tokens`, or at the end of the model's context.",
    "malformed": "The row could not be read.",
    "missing_value": "A value that the prompt needs is null, NaN or not there.",
    "empty_prompt": "The prompt has no text.",
    "too_long": "Prompt and answer do not fit the context of the model.",
    "skipped": "The prompt is too long, and such prompts were to be left out.",
    "invalid_prompt": "The chat messages are no conversation that the model's template accepts.",
    "invalid_option": "The options of the row are not valid.",
    "unknown_model": "The row asks for another model.",
    "duplicate_id": "An earlier row has the same id.",
    "schema_invalid": "The answer does not have the form that was asked for.",
    "deadline": "The answer took longer than the row was given.",
    "out_of_cache": "The row does not fit into the memory of the engine, even alone.",
    "out_of_memory": "The engine had no memory left for the row.",
    "engine_error": "The engine failed on the row.",
    "unauthorized": "The endpoint does not accept the token, or asks for one.",
    "not_found": "The endpoint has no such model or route.",
    "rate_limited": "The endpoint took no more requests, however long they waited.",
    "unavailable": "The endpoint could not be reached, or did not wake up in time.",
    "bad_answer": "The endpoint did not answer as an inference server does, or its answer was too large.",
}
"""What each status means. "ok" and "length" are the statuses without an error."""


def find_commits(journal: Journal, job: BatchJob) -> Sequence[Commits]:
    """Return the commits of each model that an earlier run of the same job has found, whatever was pushed since."""
    record = journal.read_job() or {}
    if record.get("asked") == json.loads(json.dumps(job.asked)):
        commits: list[Commits] = record["commits"]
        return commits
    return [()] * len(job.asked)


@dataclass(frozen=True, slots=True)
class BatchRun:
    """One run of a batch: what was finished before it, the number of its rows, and its shards that have rows left."""

    owner: JournalOwner
    counts: JournalCounts
    rows: int
    shards: tuple[Shard, ...]


def choose_rows(table_rows: int, rows: int | None, options: BatchOptions) -> Rows | None:
    """Return the rows of a trial, None where all rows are to be answered.

    Raises:
        BatchError: If the first rows and a sample are both asked for.
    """
    if rows is not None and options.sample is not None:
        raise BatchError(f"`rows` ({rows}) and `sample` ({options.sample}) are two kinds of trial. Leave one out.")
    if rows is not None:
        if rows < 1:
            raise BatchError(f"`rows` must be 1 or more, got {rows}. Leave it out for all rows.")
        return range(min(rows, table_rows))
    if options.sample is None:
        return None
    number = min(options.sample, table_rows)
    return tuple(sorted(random.Random(options.sample_seed).sample(range(table_rows), number)))


def open_run(
    owner: JournalOwner, job: BatchJob, more: BatchOptions | None = None, chosen: Rows | None = None
) -> BatchRun:
    """Take over a journal, or begin it, and cut the rows that are left, of all or of a trial, into shards.

    The shards work as this call says: where the files lie, and the names of the model, may differ from an earlier one.

    Raises:
        BatchError: If the journal belongs to another job.
    """
    more, journal = more or BatchOptions(), owner.journal
    record = journal.read_job()
    if record is not None:
        check_same_job(job, record, journal.place.url)
    owner.write("job", {**job.as_dict(), "created": (record or {}).get("created", time.time())})
    retry_before = owner.epoch if more.retry_failed else 0
    rows = range(job.table.rows) if chosen is None else chosen
    parts = cut_shards(rows, more.shards)
    counts = count_rows(journal, job, parts, retry_before)
    settings = (retry_before, more.max_concurrency, more.deduplicate, more.group_by_prefix)
    left = [part for part, count in zip(parts, counts, strict=True) if count.rows < len(part)]
    shards = tuple(Shard(part, owner, *settings) for part in left)
    return BatchRun(owner, JournalCounts.sum(counts), len(rows), shards)


def cut_shards(rows: Rows, shards: int) -> list[Rows]:
    """Return the rows in even parts; none is very small."""
    number = max(1, min(shards, len(rows) // LEAST_SHARD_ROWS))
    bounds = [len(rows) * index // number for index in range(number + 1)]
    return [rows[low:high] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]


def count_rows(journal: Journal, job: BatchJob, parts: Sequence[Rows], retry_before: int) -> list[JournalCounts]:
    """Return for each part of the rows what they came to, as the journal has it. Damaged segments are set aside."""
    import pyarrow as pa
    import pyarrow.compute as pc

    sweep = JournalRows(journal, job.key, repair=True)
    counts = []
    for part in parts:
        found = [JournalCounts()]
        for rows in sweep.sweep(part[0], part[-1] + 1):
            old_failures = pc.and_(pc.is_valid(rows["error"]), pc.less(rows["epoch"], retry_before))
            rows = rows.filter(pc.invert(old_failures))
            if not isinstance(part, range):
                rows = rows.filter(pc.is_in(rows["row"], pa.array(part, pa.int64())))
            found.append(JournalCounts.of(rows))
        counts.append(JournalCounts.sum(found))
    return counts


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch is, with the current rates.

    Attributes:
        seconds: Time since the run began, or from the first request to the last answer of one that has ended.
        finished: Number of rows that are committed, by this run or an earlier one.
        resumed: Number of those that an earlier run had committed.
        failed: Number of committed rows that failed, in all runs.
        tokens: Number of tokens that this run has generated and committed.
        invalid: Number of committed rows whose answer does not have the form that was asked for.
    """

    rows: int
    finished: int = 0
    resumed: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0
    rows_per_second: float = 0.0
    tokens_per_second: float = 0.0
    invalid: int = 0

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
    """Measures the progress of a batch through the names of its journal's segments, wherever its shards run.

    `before` is what was finished before it began.
    """

    def __init__(self, journal: Journal, rows: int, before: JournalCounts) -> None:
        self._journal, self._rows, self._before = journal, rows, before._replace(tokens=0)
        # When failed rows are retried, the journal holds what is to be replaced, too.
        self._old = journal.count()
        self._began = time.monotonic()
        self._recent: deque[tuple[float, int, int]] = deque([(0.0, before.rows, 0)])
        self.samples: list[tuple[float, int]] = [(0.0, before.rows)]
        self._sample_seconds = 1.0
        self._outage, self._last = StoreOutage(), Progress(rows, before.rows, before.rows, before.failed)

    def measure(self) -> Progress:
        """Look at the journal and return the progress; the last one while its store is away for a moment."""
        with self._outage:
            self._last = self._measure()
        return self._last

    def _measure(self) -> Progress:
        now, new = time.monotonic() - self._began, self._journal.count()
        finished, failed, invalid, tokens = (
            before + there - old for before, there, old in zip(self._before, new, self._old, strict=True)
        )
        self._recent.append((now, finished, tokens))
        while len(self._recent) > 2 and now - self._recent[0][0] > RATE_SECONDS:
            self._recent.popleft()
        self._keep_sample(now, finished)
        then, old_finished, old_tokens = self._recent[0]
        span = max(now - then, 1e-6)
        return Progress(
            self._rows, finished, self._before.rows, failed, tokens, now, (finished - old_finished) / span,
            (tokens - old_tokens) / span, invalid,
        )  # fmt: skip

    def _keep_sample(self, now: float, finished: int) -> None:
        if now - self.samples[-1][0] >= self._sample_seconds:
            self.samples.append((now, finished))
        if len(self.samples) > MAX_SAMPLES:
            self.samples = self.samples[::2]
            self._sample_seconds *= 2


def check_failures(progress: Progress, max_failures: float | None, min_valid: float | None = None) -> None:
    """End a batch that is hopeless, whichever of its runs the failures are from.

    Raises:
        BatchError: If too many failed.
    """
    whole = progress.finished >= progress.rows
    if max_failures is not None:
        seen = progress.finished if progress.finished >= LEAST_ROWS_FOR_SHARES else progress.rows
        limit = max_failures if max_failures >= 1 else max_failures * seen
        if progress.failed > limit:
            raise BatchError(
                f"{progress.failed} of {progress.finished} rows failed, more than `max_failures` ({max_failures:g}) "
                "allows. What is finished is in the journal. Look at the errors, then start again with "
                "`retry_failed=True` for the failed rows, or with a higher `max_failures`."
            )
    answered = progress.finished - progress.failed + progress.invalid
    if min_valid is not None and answered >= (1 if whole else LEAST_ROWS_FOR_SHARES):
        share = 1 - progress.invalid / answered
        if share < min_valid:
            raise BatchError(
                f"{progress.invalid} of {answered} answers do not have the form that was asked for: {share:.0%} are "
                f"valid, less than `min_valid` ({min_valid:.0%}). What is finished is in the journal. Correct the "
                "prompt or the form and choose another output, or start again with a lower `min_valid`."
            )


class CancelWatch:
    """Asks Prefect from time to time whether the current flow run was cancelled, in a thread of its own.

    A worker ends the process of such a run; nobody else does. A server that does not answer is no reason to end.
    """

    def __init__(self) -> None:
        from prefect.context import FlowRunContext

        context = FlowRunContext.get()
        self._run: UUID | None = context.flow_run.id if context is not None and context.flow_run is not None else None
        self._ended = threading.Event()
        self._cancelled = threading.Event()

    def __enter__(self) -> CancelWatch:
        if self._run is not None:
            threading.Thread(target=self._watch, args=(self._run,), name="cancel-watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def is_cancelled(self) -> bool:
        """Return whether the run was cancelled."""
        return self._cancelled.is_set()

    def check(self) -> None:
        """Check that the run was not cancelled.

        Raises:
            BatchCancelledError: If it was.
        """
        if self.is_cancelled():
            raise BatchCancelledError("The run was cancelled in Prefect. Its journal keeps what is finished.")

    def _watch(self, run: UUID) -> None:
        from prefect.client.orchestration import get_client

        while not self._ended.wait(CANCEL_CHECK_SECONDS) and not self._cancelled.is_set():
            with suppress(Exception), get_client(sync_client=True) as client:
                while not self._cancelled.is_set():  # one client for all looks: it takes 50 ms to make
                    state = client.read_flow_run(run).state
                    if state is not None and (state.is_cancelled() or state.is_cancelling()):
                        self._cancelled.set()
                    elif self._ended.wait(CANCEL_CHECK_SECONDS):
                        break


@dataclass(frozen=True, slots=True)
class BatchStatus:
    """How far a batch is: the rows in its journal, by their status, and whether a run works on it now."""

    source: str
    rows: int
    finished: int
    failed: int
    statuses: Mapping[str, int] = field(default_factory=dict)
    running: bool = False

    @property
    def left(self) -> int:
        """Number of rows that are left."""
        return self.rows - self.finished


def get_status(destination: str) -> BatchStatus:
    """Look into the journal of the batch with an output, also while it runs. Nothing is changed.

    Raises:
        BatchError: If the batch has no journal.
    """
    journal = Journal.beside(destination)
    record = journal.read_job()
    if record is None:
        raise BatchError(f"{journal.place.url!r} is not there: the batch never began, or is done. Look for its output.")
    job = BatchJob.from_dict(record)
    sweep = JournalRows(journal, job.key)
    statuses: Counter[str] = Counter()
    counts = [JournalCounts()]
    for rows in sweep.sweep(0, job.table.rows):
        counts.append(JournalCounts.of(rows))
        statuses.update(rows.filter(rows["is_last"])["status"].to_pylist())
    count = JournalCounts.sum(counts)
    return BatchStatus(
        job.table.source, job.table.rows, count.rows, count.failed, dict(sorted(statuses.items())), is_held(journal)
    )
