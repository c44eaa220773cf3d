"""One run of a batch: owning its journal, cutting the rows into shards, watching them, and when to give up."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from prefect_huggingface.tasks.batching.job import BatchJob, BatchOptions, Commits, Output, check_same_job
from prefect_huggingface.tasks.batching.shard import Chosen, Shard, ShardSettings, count_chosen
from prefect_huggingface.tasks.errors import BatchCancelledError, BatchError
from prefect_huggingface.tasks.records import BatchSummary
from prefect_huggingface.tasks.storage.journals.journal import Journal, JournalRows, SegmentName
from prefect_huggingface.tasks.storage.journals.ownership import IfRunning, JournalOwner, hold_journal, is_held
from prefect_huggingface.tasks.storage.places import Place

LEAST_SHARD_ROWS = 16
SWEEP_ROWS = 50_000
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
    "out_of_cache": "The engine had no memory left for the row.",
    "engine_error": "The engine failed on the row.",
    "unauthorized": "The endpoint does not accept the token, or asks for one.",
    "not_found": "The endpoint has no such model or route.",
    "rate_limited": "The endpoint took no more requests, however long they waited.",
    "unavailable": "The endpoint could not be reached, or did not wake up in time.",
    "bad_answer": "The endpoint did not answer as an inference server does, or its answer was too large.",
}
"""What each status means. "ok" and "length" are the statuses without an error."""


@contextmanager
def own_journal(journal: Journal, if_running: IfRunning) -> Iterator[JournalOwner]:
    """Own a journal for the time of the block.

    Raises:
        BatchError: If another run owns it and is not to be waited for, or if it cannot be written.
    """
    with ExitStack() as stack:
        try:
            owner = stack.enter_context(hold_journal(journal, if_running))
        except OSError as exc:
            raise BatchError(
                f"The journal {journal.place.url!r} cannot be written: {exc}. Correct `destination`, or its rights."
            ) from None
        yield owner


def find_finished(journal: Journal, job: BatchJob, output: Output) -> BatchSummary | None:
    """Return the summary of a call that has published its output already, also if it was killed right after."""
    record = journal.read_published()
    if record.get("call") != job.call_key(output) or not is_published(record, Place.of(output.destination)):
        return None
    return BatchSummary(**record["summary"])


def find_commits(journal: Journal, job: BatchJob) -> Sequence[Commits]:
    """Return the commits of each model that an earlier run of the same job has found, whatever was pushed since."""
    record = journal.read_job() or {}
    if record.get("asked") == json.loads(json.dumps(job.asked)):
        commits: list[Commits] = record["commits"]
        return commits
    return [()] * len(job.asked)


def is_published(record: Mapping[str, Any], place: Place) -> bool:
    """Return whether the output at a place is the one of a record, which is written right before it is published."""
    if not record or not place.exists() or place.is_folder() or place.info()["size"] != record["size"]:
        return False
    return not place.is_local or place.digest() == record["sha256"]


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Counts of rows in a journal.

    Attributes:
        finished: Rows that are not to be generated again.
        failed: Those of them that failed.
        invalid: Those of them whose answer does not have the form that was asked for.
    """

    finished: int = 0
    failed: int = 0
    invalid: int = 0

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(self.finished + other.finished, self.failed + other.failed, self.invalid + other.invalid)


@dataclass(frozen=True, slots=True)
class BatchRun:
    """One run of a batch.

    Attributes:
        owner: The run as the owner of the journal.
        counts: What was finished before it.
        rows: Number of rows that it is about.
        shards: Parts of it that have rows left.
    """

    owner: JournalOwner
    counts: RowCounts
    rows: int
    shards: tuple[Shard, ...]

    @property
    def journal(self) -> Journal:
        """Its journal."""
        return self.owner.journal


def choose_rows(table_rows: int, rows: int | None, options: BatchOptions) -> Chosen | None:
    """Return the rows of a trial, None where all rows are to be answered.

    Raises:
        BatchError: If the first rows and a sample are both asked for.
    """
    if rows is not None and options.sample is not None:
        raise BatchError(f"`rows` ({rows}) and `sample` ({options.sample}) are two kinds of trial. Leave one out.")
    if rows is not None:
        return range(min(rows, table_rows))
    if options.sample is None:
        return None
    number = min(options.sample, table_rows)
    return tuple(sorted(random.Random(options.sample_seed).sample(range(table_rows), number)))


def open_run(
    owner: JournalOwner,
    job: BatchJob,
    shards: int = 1,
    retry_failed: bool = False,
    settings: ShardSettings | None = None,
    chosen: Chosen | None = None,
) -> BatchRun:
    """Take over a journal, or begin it, and cut the rows that are left into shards.

    Args:
        owner: This run, which owns the journal beside the destination.
        job: Job to do.
        shards: Number of shards.
        retry_failed: Whether rows that failed in an earlier run are generated again.
        settings: How the shards go through their rows.
        chosen: Rows of a trial, None for all.

    Raises:
        BatchError: If the journal belongs to another job.
    """
    journal = owner.journal
    record = journal.read_job()
    if record is None:
        owner.write_job({**job.as_dict(), "created": time.time()})
    else:
        check_same_job(job, record, journal.place.url)
    retry_before = owner.epoch if retry_failed else 0
    cut = cut_shards(job.table.rows, shards)
    counts = count_rows(journal, job, cut, retry_before, chosen)
    settings = settings or ShardSettings()
    every = [
        Shard(start, stop, owner.id, owner.epoch, retry_before, settings, part_of(chosen, start, stop))
        for start, stop in cut
    ]
    left = tuple(shard for shard, count in zip(every, counts, strict=True) if count.finished < shard.rows)
    return BatchRun(owner, sum(counts, RowCounts()), count_chosen(chosen, 0, job.table.rows), left)


def cut_shards(rows: int, shards: int) -> list[tuple[int, int]]:
    """Return the ranges of rows of even shards; none is very small."""
    number = max(1, min(shards, rows // LEAST_SHARD_ROWS))
    bounds = [rows * index // number for index in range(number + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def part_of(chosen: Chosen | None, start: int, stop: int) -> Chosen | None:
    """Return those of the chosen rows that are in a range."""
    if chosen is None:
        return None
    if isinstance(chosen, range):
        return range(max(chosen.start, start), max(min(chosen.stop, stop), max(chosen.start, start)))
    return tuple(row for row in chosen if start <= row < stop)


def count_rows(
    journal: Journal, job: BatchJob, cut: list[tuple[int, int]], retry_before: int, chosen: Chosen | None = None
) -> list[RowCounts]:
    """Return for each range what its rows in the journal came to."""
    import pyarrow as pa
    import pyarrow.compute as pc

    sweep = JournalRows(journal, job.key, journal.check(job.key))
    counts = []
    for start, stop in cut:
        count = RowCounts()
        for first in range(start, stop, SWEEP_ROWS):
            rows = sweep.take(first, min(first + SWEEP_ROWS, stop))
            rows = rows.filter(pc.and_(rows["is_last"], pc.invert(_is_old_failure(rows, retry_before))))
            if chosen is not None:
                wanted = part_of(chosen, first, min(first + SWEEP_ROWS, stop))
                rows = rows.filter(pc.is_in(rows["row"], pa.array(list(wanted or ()), pa.int64())))
            count += _count(rows)
        counts.append(count)
    return counts


def _is_old_failure(rows: Any, retry_before: int) -> Any:
    import pyarrow.compute as pc

    return pc.and_(pc.is_valid(rows["error"]), pc.less(rows["epoch"], retry_before))


def _count(rows: Any) -> RowCounts:
    """Count the rows of a table of last steps."""
    import pyarrow.compute as pc

    invalid = pc.sum(pc.equal(rows["status"], "schema_invalid")).as_py() or 0
    return RowCounts(rows.num_rows, rows.num_rows - rows["error"].null_count, invalid)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch is.

    Attributes:
        rows: Number of rows of the batch.
        finished: Number of rows that are committed, by this run or an earlier one.
        resumed: Number of those that an earlier run had committed.
        failed: Number of committed rows that failed, in all runs.
        tokens: Number of tokens that this run has generated and committed.
        seconds: Time since the run began.
        rows_per_second: Current rate.
        tokens_per_second: Current rate.
        invalid: Number of committed rows whose answer is not of its form, where that is counted.
    """

    rows: int
    finished: int
    resumed: int
    failed: int
    tokens: int
    seconds: float
    rows_per_second: float
    tokens_per_second: float
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

    Args:
        journal: Journal of the batch.
        rows: Number of rows of the batch.
        counts: What was finished before.
        job: Key of the job, to look also for answers that are not of their form, which reads every segment.
    """

    def __init__(self, journal: Journal, rows: int, counts: RowCounts | None = None, job: str | None = None) -> None:
        self._journal, self._rows, self._job = journal, rows, job
        self._before = counts or RowCounts()
        # When failed rows are retried, the journal holds what is to be replaced, too.
        self._old = journal.count()
        self._invalid = self._before.invalid
        self._read: set[SegmentName] = set(journal.names() if job else ())
        self._began = time.monotonic()
        self._recent: deque[tuple[float, int, int]] = deque([(0.0, self._before.finished, 0)])
        self.samples: list[tuple[float, int]] = [(0.0, self._before.finished)]
        self._sample_seconds = 1.0

    def measure(self) -> Progress:
        """Look at the journal and return the progress."""
        counts = self._journal.count()
        now = time.monotonic() - self._began
        finished = self._before.finished + counts.rows - self._old.rows
        tokens = counts.tokens - self._old.tokens
        self._recent.append((now, finished, tokens))
        while len(self._recent) > 2 and now - self._recent[0][0] > RATE_SECONDS:
            self._recent.popleft()
        self._keep_sample(now, finished)
        then, old_finished, old_tokens = self._recent[0]
        span = max(now - then, 1e-6)
        failed = self._before.failed + counts.failed - self._old.failed
        return Progress(
            self._rows, finished, self._before.finished, failed, tokens, now, (finished - old_finished) / span,
            (tokens - old_tokens) / span, self._count_invalid(),
        )  # fmt: skip

    def _count_invalid(self) -> int:
        for name in (each for each in self._journal.names() if self._job and each not in self._read):
            rows = self._journal.load(name, str(self._job))
            self._invalid += _count(rows.filter(rows["is_last"])).invalid
            self._read.add(name)
        return self._invalid

    def _keep_sample(self, now: float, finished: int) -> None:
        if now - self.samples[-1][0] >= self._sample_seconds:
            self.samples.append((now, finished))
        if len(self.samples) > MAX_SAMPLES:
            self.samples = self.samples[::2]
            self._sample_seconds *= 2


def check_failures(progress: Progress, max_failures: float | None, min_valid: float | None = None) -> None:
    """End a batch that is hopeless, whichever of its runs the failures are from.

    Args:
        progress: How far the batch is.
        max_failures: Number of failures that is too many when passed; below 1 a share of the rows.
        min_valid: Least share of the answers that must have the form that was asked for.

    Raises:
        BatchError: If too many failed.
    """
    whole = progress.finished >= progress.rows
    if max_failures is not None:
        seen = progress.finished if progress.finished >= LEAST_ROWS_FOR_SHARES else progress.rows
        limit = max_failures if max_failures >= 1 else max_failures * (progress.rows if whole else seen)
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

    def check(self) -> None:
        """Check that the run was not cancelled.

        Raises:
            BatchCancelledError: If it was.
        """
        if self._cancelled.is_set():
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
    """How far a batch is.

    Attributes:
        source: Its input.
        rows: Number of its rows.
        finished: Number of rows in its journal.
        failed: Number of those that failed.
        statuses: Number of finished rows by status.
        running: Whether a run works on it now.
    """

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
    """Look into the journal of a batch, also while it runs. Nothing is changed.

    Args:
        destination: Output of the batch.

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
    counts = RowCounts()
    for start in range(0, job.table.rows, SWEEP_ROWS):
        rows = sweep.take(start, start + SWEEP_ROWS)
        rows = rows.filter(rows["is_last"])
        counts += _count(rows)
        statuses.update(rows["status"].to_pylist())
    return BatchStatus(
        job.table.source, job.table.rows, counts.finished, counts.failed, dict(sorted(statuses.items())),
        is_held(journal),
    )  # fmt: skip
