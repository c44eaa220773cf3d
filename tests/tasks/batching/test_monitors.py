"""Progress and status are read off the journal, also after a resume and while failed rows are retried."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import pytest

from prefect_huggingface.tasks.batches import get_batch_status
from prefect_huggingface.tasks.batching.job import BatchOptions, plan_job
from prefect_huggingface.tasks.batching.run import MAX_SAMPLES, STATUSES, BatchMonitor, open_run
from prefect_huggingface.tasks.batching.shard import process_shard
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.storage.journals.journal import Journal, JournalCounts
from prefect_huggingface.tasks.storage.journals.ownership import hold_journal
from support.instant_engines import InstantEngine
from support.journals import claim_journal


@pytest.fixture
def destination(tmp_path: Path) -> str:
    rows = [{"country": f"Land {index}" if index % 4 else None} for index in range(1000)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "out.jsonl")


def test_a_batch_from_its_beginning_to_a_retry(destination: str) -> None:
    job = plan_job(str(Path(destination).parent / "in.jsonl"), "{country}")
    journal = Journal.beside(destination)
    with pytest.raises(BatchError, match="is not there"):
        get_batch_status.fn(destination)

    run = open_run(claim_journal(journal), job, BatchOptions(shards=2))
    monitor = BatchMonitor(journal, 1000, run.counts)
    assert monitor.measure().finished == 0
    process_shard([InstantEngine()], run.shards[0])
    half = monitor.measure()
    assert (half.finished, half.failed, half.resumed, half.tokens, half.share) == (500, 125, 0, 3 * 375, 0.5)
    assert half.rows_per_second > 0
    assert half.seconds_left == pytest.approx(500 / half.rows_per_second)

    with hold_journal(journal) as owner:
        run = open_run(owner, job)
        assert run.counts.rows == 500
        monitor = BatchMonitor(journal, 1000, run.counts)
        assert get_batch_status.fn(destination).running
        process_shard([InstantEngine()], run.shards[0])
    whole = monitor.measure()
    assert (whole.finished, whole.failed, whole.resumed, whole.tokens, whole.share) == (1000, 250, 500, 3 * 375, 1.0)
    status = get_batch_status.fn(destination)
    assert (status.rows, status.finished, status.failed, status.left, status.running) == (1000, 1000, 250, 0, False)
    assert status.statuses == {"missing_value": 250, "ok": 750}
    assert set(status.statuses) <= set(STATUSES)

    run = open_run(claim_journal(journal), job, BatchOptions(retry_failed=True))
    monitor = BatchMonitor(journal, 1000, run.counts)
    before = monitor.measure()
    assert (before.finished, before.failed, before.resumed) == (750, 0, 750)
    process_shard([InstantEngine()], run.shards[0])
    assert (monitor.measure().finished, monitor.measure().failed) == (1000, 250)


def test_the_samples_of_a_long_run_stay_few(destination: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = BatchMonitor(Journal.beside(destination), 1000, JournalCounts())
    times = itertools.count(time.monotonic(), 7)
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    for _ in range(5000):
        monitor.measure()
    monkeypatch.undo()
    assert MAX_SAMPLES / 2 <= len(monitor.samples) <= MAX_SAMPLES
    assert monitor.samples == sorted(monitor.samples)
