"""One run of a batch: taking the journal, cutting the rows into shards, and deciding when to give up."""

from __future__ import annotations

import time
from dataclasses import dataclass

from prefect_huggingface.tasks.batching.jobs import BatchJob, check_same_job
from prefect_huggingface.tasks.batching.shards import Shard, ShardSettings
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals.journal import Journal, JournalRows
from prefect_huggingface.tasks.storage.journals.ownership import JournalOwner

LEAST_SHARD_ROWS = 16


@dataclass(frozen=True, slots=True)
class BatchRun:
    """One run of a batch.

    Attributes:
        owner: The run as the owner of its journal.
        finished: Number of rows that were finished before it.
        shards: Parts of it that have rows left.
    """

    owner: JournalOwner
    finished: int
    shards: tuple[Shard, ...]

    @property
    def journal(self) -> Journal:
        """Its journal."""
        return self.owner.journal


def open_run(
    owner: JournalOwner,
    job: BatchJob,
    shards: int = 1,
    retry_failed: bool = False,
    settings: ShardSettings | None = None,
) -> BatchRun:
    """Go on with a journal, or begin it, and cut the rows that are left into shards.

    Args:
        owner: Owner of the journal beside the destination.
        job: Job to do.
        shards: Number of shards.
        retry_failed: Whether rows that failed in an earlier run are generated again.
        settings: How the shards go through their rows.

    Raises:
        BatchError: If the journal belongs to another job.
    """
    journal = owner.journal
    record = journal.read_job()
    if record is None:
        record = {**job.as_dict(), "created": time.time()}
        owner.write_job(record)
    check_same_job(job, record, journal.place.url)
    settings = settings or ShardSettings()
    retry_before = owner.epoch if retry_failed else 0
    cut = cut_shards(job.table.rows, shards)
    finished = count_finished(journal, job, cut, retry_before)
    left = tuple(
        Shard(start, stop, owner.id, owner.epoch, retry_before, settings)
        for (start, stop), done in zip(cut, finished, strict=True)
        if done < stop - start
    )
    return BatchRun(owner, sum(finished), left)


def cut_shards(rows: int, shards: int) -> list[tuple[int, int]]:
    """Return the ranges of rows of even shards; none is very small."""
    number = max(1, min(shards, rows // LEAST_SHARD_ROWS))
    bounds = [rows * index // number for index in range(number + 1)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def count_finished(journal: Journal, job: BatchJob, cut: list[tuple[int, int]], retry_before: int) -> list[int]:
    """Return for each range how many of its rows are in the journal and are not to be generated again."""
    import pyarrow.compute as pc

    sweep = JournalRows(journal, job.key, journal.check(job.key))
    counts = []
    for start, stop in cut:
        count = 0
        for first in range(start, stop, 50_000):
            rows = sweep.take(first, min(first + 50_000, stop))
            again = pc.and_(pc.is_valid(rows["error"]), pc.less(rows["epoch"], retry_before))
            count += rows.num_rows - (pc.sum(again).as_py() or 0)
        counts.append(count)
    return counts


def check_failures(failed: int, rows: int, max_failures: float | None) -> None:
    """End a batch that is hopeless.

    Args:
        failed: Number of rows that failed so far.
        rows: Number of rows of the batch.
        max_failures: Number of failures that is too many when passed; below 1 a share of all rows.

    Raises:
        BatchError: If too many failed.
    """
    if max_failures is None:
        return
    limit = max_failures if max_failures >= 1 else max_failures * rows
    if failed > limit:
        raise BatchError(
            f"{failed} of {rows} rows failed, more than `max_failures` ({max_failures:g}) allows. What is "
            "finished is in the journal. Look at the errors, then start again to go on, with `retry_failed=True` for "
            "the failed rows."
        )
