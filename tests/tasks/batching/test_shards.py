"""A shard generates each row that is left once, shares equal prompts, survives bad rows and stops when it has to."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from prefect_huggingface.tasks.batching.job import BatchJob, BatchOptions, plan_job
from prefect_huggingface.tasks.batching.output import plan_output, publish_output
from prefect_huggingface.tasks.batching.run import count_rows, cut_shards, open_run
from prefect_huggingface.tasks.batching.shard import MAX_TRIES, Room, RowFeed, ShardResult, process_shard, run_requests
from prefect_huggingface.tasks.errors import BatchError, EngineError, TableError
from prefect_huggingface.tasks.records import Completion, Request
from prefect_huggingface.tasks.storage.journals.duplicates import ResultIndex
from prefect_huggingface.tasks.storage.journals.journal import Journal
from prefect_huggingface.tasks.storage.places import Place
from prefect_huggingface.tasks.storage.tables.inputs import read_chunks
from support.instant_engines import InstantEngine
from support.journals import claim_journal

PROMPT = "What is the capital of {country}?"


class Batch:
    """One batch in a folder."""

    def __init__(self, folder: Path, lines: list[str], prompt: str = PROMPT) -> None:
        self.source, self.destination = folder / "in.jsonl", folder / "out.jsonl"
        self.source.write_text("".join(f"{line}\n" for line in lines))
        self.journal = Journal.beside(str(self.destination))
        self.job: BatchJob = plan_job(str(self.source), prompt)

    def run(self, engine: InstantEngine, **more: Any) -> list[ShardResult]:
        run = open_run(claim_journal(self.journal), self.job, BatchOptions(**more))
        return [process_shard([engine], shard) for shard in run.shards]

    def publish(self, replace: bool = False) -> list[dict[str, Any]]:
        output = plan_output(str(self.source), str(self.destination))
        publish_output(self.job, claim_journal(self.journal), output, replace)
        return [json.loads(line) for line in self.destination.read_text().splitlines()]


def countries(number: int, repeat: int = 1) -> list[str]:
    return [json.dumps({"country": f"Land {index // repeat}"}) for index in range(number)]


def recording(**arguments: Any) -> InstantEngine:
    engine = InstantEngine(**arguments)
    engine.prompts = []
    return engine


@pytest.mark.parametrize("shards", [1, 7])
def test_every_row_once_in_order(tmp_path: Path, shards: int) -> None:
    batch, engine = Batch(tmp_path, countries(10_000)), recording()
    results = batch.run(engine, shards=shards)

    assert all(result.complete for result in results)
    assert len(results) == shards
    assert len(engine.prompts or ()) == len(set(engine.prompts or ())) == 10_000
    rows = batch.publish()
    assert [row["country"] for row in rows] == [f"Land {index}" for index in range(10_000)]
    assert list(rows[0]) == [
        "country", "completion", "status", "finish_reason", "prompt_tokens", "generated_tokens", "seconds", "error",
    ]  # fmt: skip
    assert {row["status"] for row in rows} == {"ok"}
    assert rows[3]["completion"] != rows[4]["completion"]


@pytest.mark.parametrize("deduplicate", [True, False])
def test_equal_prompts_are_generated_once_over_the_whole_input(tmp_path: Path, deduplicate: bool) -> None:
    lines = [json.dumps({"country": f"Land {index % 700}"}) for index in range(20_000)]
    batch, engine = Batch(tmp_path, lines), recording()
    batch.run(engine, deduplicate=deduplicate)

    assert len(engine.prompts or ()) == (700 if deduplicate else 20_000)
    rows = batch.publish()
    assert all(rows[index]["completion"] == rows[index % 700]["completion"] for index in range(20_000))
    assert batch.journal.count().tokens == 3 * (700 if deduplicate else 20_000)


def test_rows_that_wait_for_their_like_are_bounded(tmp_path: Path) -> None:
    batch = Batch(tmp_path, [json.dumps({"country": f"Land {index % 40}"}) for index in range(60_000)])
    read, results = 0, []

    def chunks() -> Iterator[Any]:
        nonlocal read
        for chunk in read_chunks(batch.job.table):
            read += len(chunk)
            yield chunk, []

    with ResultIndex() as index:
        feed = RowFeed(batch.job.make_requests(), chunks(), results.extend, index)
        asked = feed.take(64)
        assert len(asked) == 40
        assert read < 30_000
        while asked:
            feed.finish([Completion("A town", "stop", 5, 3, request_id=each.number) for each in asked])
            asked = feed.take(64)
    assert sorted(result.row for result in results) == list(range(60_000))


class FailingEngine(InstantEngine):
    """Fails with a code at its first requests."""

    def __init__(self, code: str, failures: int) -> None:
        super().__init__()
        self.prompts, self._code, self._failures = [], code, failures

    def _answer(self, future: Any, request: Any) -> None:
        if len(self.prompts or ()) >= self._failures:
            super()._answer(future, request)
            return
        reason: Any = "deadline" if self._code == "deadline" else "error"
        error = None if reason == "deadline" else "It failed."
        self.prompts = [*(self.prompts or ()), request.prompt]
        future.set_result(Completion("", reason, 5, 0, error=error, error_code=self._code, request_id=request.id))


@pytest.mark.parametrize("code", ["rate_limited", "unavailable", "out_of_memory", "deadline"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_moment_of_failure_is_not_that_of_all_equal_prompts(tmp_path: Path, code: str, steps: int) -> None:
    batch, engine = Batch(tmp_path, countries(4000, repeat=4000)), FailingEngine(code, 1)
    if steps:
        chain = [{"name": "a", "prompt": "{country}"}, {"name": "b", "prompt": "{a}"}]
        batch.job = plan_job(str(batch.source), None, more=BatchOptions(steps=chain))
    assert batch.run(engine)[0].complete
    assert [row["status"] for row in batch.publish()] == [code, *["ok"] * 3999]
    assert len(engine.prompts or ()) == 2 + (steps > 1)


@pytest.mark.parametrize(
    ("code", "asked"), [("rate_limited", MAX_TRIES), ("too_long", 1), ("unauthorized", 1), ("out_of_cache", 1)]
)
def test_a_failure_that_stays_is_that_of_all_equal_prompts(tmp_path: Path, code: str, asked: int) -> None:
    batch, engine = Batch(tmp_path, countries(4000, repeat=4000)), FailingEngine(code, 10_000)
    assert batch.run(engine)[0].complete
    assert [row["status"] for row in batch.publish()] == [code] * 4000
    assert len(engine.prompts or ()) == asked


def test_sharing_goes_on_after_a_restart(tmp_path: Path) -> None:
    batch = Batch(tmp_path, [json.dumps({"country": f"Land {index % 50}"}) for index in range(5000)])
    first = open_run(claim_journal(batch.journal), batch.job, BatchOptions(shards=2)).shards[0]
    process_shard([InstantEngine()], first)
    assert batch.journal.count().rows == 2500
    engine = recording()
    batch.run(engine)

    assert engine.prompts == []  # all fifty prompts were answered before the restart
    assert len(batch.publish()) == 5000


def test_bad_rows_are_rows(tmp_path: Path) -> None:
    lines = ['{"country": "Peru"}', '{"country": ', '{"town": 1}', '{"country": null}', '{"country": NaN}']
    lines += ['{"country": ""}', '{"country": "Peru"}']
    batch = Batch(tmp_path, lines, "{country}")
    batch.run(InstantEngine("Lima"))
    rows = batch.publish()

    statuses = ["ok", "malformed", "missing_value", "missing_value", "missing_value", "empty_prompt", "ok"]
    assert [row["status"] for row in rows] == statuses
    assert "Line 2 of 'in.jsonl'" in rows[1]["error"]
    assert rows[1]["completion"] is None
    assert rows[4]["country"] is None  # JSON has no NaN


def test_a_stop_ends_a_shard_soon_and_keeps_what_is_finished(tmp_path: Path) -> None:
    batch = Batch(tmp_path, countries(5000))
    run = open_run(claim_journal(batch.journal), batch.job)
    results: list[ShardResult] = []
    engine = recording(seconds=0.05)
    thread = threading.Thread(target=lambda: results.append(process_shard([engine], run.shards[0])), daemon=True)
    thread.start()
    time.sleep(1.5)
    run.owner.request_stop("test")
    began = time.monotonic()
    thread.join(10)

    assert time.monotonic() - began < 3
    assert not results[0].complete
    assert 0 < results[0].finished == batch.journal.count().rows < 5000
    with pytest.raises(BatchError, match="lacks"):
        batch.publish()
    assert not batch.destination.exists()
    batch.run(InstantEngine())
    assert len(batch.publish()) == 5000


def test_a_shard_of_an_older_run_gives_way(tmp_path: Path) -> None:
    batch = Batch(tmp_path, countries(100))
    old = open_run(claim_journal(batch.journal), batch.job).shards[0]
    open_run(claim_journal(batch.journal), batch.job)
    assert process_shard([InstantEngine()], old).finished == 0


@pytest.mark.parametrize("limit", [1, 3])
def test_shards_of_a_process_have_so_many_rows_in_the_engine_together(tmp_path: Path, limit: int) -> None:
    class CountingEngine(InstantEngine):
        now = most = 0

        def submit(self, *arguments: Any) -> Any:
            with lock:
                self.now += 1
                self.most = max(self.most, self.now)
            return super().submit(*arguments)

        def _answer(self, future: Any, request: Any) -> None:
            with lock:
                self.now -= 1
            super()._answer(future, request)

    lock, engine = threading.Lock(), CountingEngine(seconds=0.002)
    batch = Batch(tmp_path, countries(200))
    run = open_run(claim_journal(batch.journal), batch.job, BatchOptions(shards=8, max_concurrency=limit))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda shard: process_shard([engine], shard), run.shards))
    assert len(results) == 8
    assert all(result.complete for result in results)
    assert engine.most == limit
    assert len(batch.publish()) == 200


@pytest.mark.parametrize("fault", ["input", "engine"])
def test_a_shard_that_fails_leaves_its_room_to_the_others(tmp_path: Path, fault: str) -> None:
    class Engine(InstantEngine):
        def submit(self, request: Request, *arguments: Any) -> Future[Completion]:
            if fault == "engine" and request.prompt == PROMPT.format(country="Land 2"):
                raise EngineError("The engine was closed.")
            return super().submit(request, *arguments)

    batch = Batch(tmp_path, countries(8))
    if fault == "input":
        batch.source.write_text(batch.source.read_text().replace("Land 2", "Land 9"))
    room = Room(4)
    feed = RowFeed(batch.job.make_requests(), ((chunk, []) for chunk in read_chunks(batch.job.table)), lambda _: None)
    with pytest.raises((TableError, EngineError)):
        list(run_requests([Engine()], feed, room, lambda: False))
    assert room.take(1.0) == 4


def test_failed_rows_are_retried_alone(tmp_path: Path) -> None:
    lines = [json.dumps({"country": "Land" if index % 10 else "  "}) + " " * index for index in range(200)]
    batch = Batch(tmp_path, lines, "{country}")
    batch.run(InstantEngine())
    assert sum(row["status"] == "empty_prompt" for row in batch.publish()) == 20
    assert batch.run(InstantEngine()) == []  # without being asked, nothing is generated again

    class Forgiving(InstantEngine):
        def _answer(self, future: Any, request: Any) -> None:
            super()._answer(future, type(request)(prompt=f"{request.prompt}x", id=request.id))

    engine = Forgiving()
    engine.prompts = []
    batch.run(engine, retry_failed=True)
    rows = batch.publish(replace=True)
    assert set(engine.prompts) == {"  x"}
    assert {row["status"] for row in rows} == {"ok"}
    assert len(rows) == 200


def test_the_journal_of_another_job_is_refused(tmp_path: Path) -> None:
    batch = Batch(tmp_path, countries(20))
    batch.run(InstantEngine())
    other = plan_job(str(batch.source), "Where is {country}?")
    with pytest.raises(BatchError, match=r'prompt: "What is the capital of .* there, "Where is'):
        open_run(claim_journal(batch.journal), other)
    batch.source.write_text('{"country": "New"}\n')
    with pytest.raises(BatchError, match="input: "):
        open_run(claim_journal(batch.journal), plan_job(str(batch.source), PROMPT))


def test_an_input_that_was_moved_between_two_runs_is_read_where_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "before"
    folder.mkdir()
    batch = Batch(folder, countries(100))
    process_shard(
        [InstantEngine()], open_run(claim_journal(batch.journal), batch.job, BatchOptions(shards=2)).shards[0]
    )
    created = (batch.journal.read_job() or {})["created"]
    folder.rename(tmp_path / "after")
    moved = Batch(tmp_path / "after", countries(100))
    engine = recording()
    moved.run(engine)
    assert len(engine.prompts or ()) == 50
    assert len(moved.publish()) == 100
    assert (moved.journal.read_job() or {})["created"] == created


def test_an_input_that_changed_meanwhile_is_noticed(tmp_path: Path) -> None:
    batch = Batch(tmp_path, countries(20))
    batch.run(InstantEngine())
    batch.source.write_text(batch.source.read_text().replace("Land 7", "Land 8"))
    with pytest.raises(TableError, match="has changed since the batch began"):
        batch.publish()
    assert not batch.destination.exists()


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_an_input_that_was_touched_or_put_back_is_the_same(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Toucher(InstantEngine):
        def submit(self, *arguments: Any) -> Any:
            if not touched:
                touched.append(os.utime(source, (2, 2)))
            return super().submit(*arguments)

    touched: list[None] = []
    digests: list[str] = []
    source, table = tmp_path / f"in.{suffix}", pa.table({"country": [f"Land {index}" for index in range(5000)]})
    if suffix == "jsonl":
        source.write_text("".join(f"{json.dumps(row)}\n" for row in table.to_pylist()))
    else:
        (pa.csv.write_csv if suffix == "csv" else pa.parquet.write_table)(table, source)
    output = plan_output(str(source), str(tmp_path / "out.jsonl"))
    journal, job = Journal.beside(output.destination), plan_job(str(source), PROMPT)
    run = open_run(claim_journal(journal), job)
    os.utime(source, (1, 1))
    digest = Place.digest
    monkeypatch.setattr(Place, "digest", lambda place: digests.append(place.url) or digest(place))
    assert process_shard([Toucher()], run.shards[0]).complete
    assert len(digests) == 2  # one for each time that it was touched
    os.utime(source, (3, 3))
    assert publish_output(job, run.owner, output).statuses == {"ok": 5000}


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "memory"])
def test_no_row_is_asked_of_an_input_that_changed_meanwhile(tmp_path: Path, suffix: str, moment: str) -> None:
    """Put back, as the error says, it gives what it would have given without the change."""
    rows = 5000

    def write(word: str) -> None:
        table = pa.table({"country": [f"{word} {index}" for index in range(rows)]})
        if suffix in ("jsonl", "memory"):
            lines = "".join(f"{json.dumps(row)}\n" for row in table.to_pylist())
            Place.of(source).write(lines.encode())
        else:
            (pa.csv.write_csv if suffix == "csv" else pa.parquet.write_table)(table, source)

    class Writer(InstantEngine):
        def submit(self, *arguments: Any) -> Any:
            if not written:
                written.append(write("City"))
            return super().submit(*arguments)

    source = f"memory://changes/{tmp_path.name}.jsonl" if suffix == "memory" else str(tmp_path / f"in.{suffix}")
    write("Land")
    written = [] if moment == "meanwhile" else [write]
    output = plan_output(source, str(tmp_path / "out.jsonl"))
    journal, job = Journal.beside(output.destination), plan_job(source, PROMPT)
    run = open_run(claim_journal(journal), job)
    if moment == "before":
        write("City")
    with pytest.raises(TableError, match="has changed since the batch began"):
        process_shard([Writer()], run.shards[0])
    write("Land")
    job = plan_job(source, PROMPT)
    process_shard([InstantEngine()], open_run(claim_journal(journal), job).shards[0])
    publish_output(job, claim_journal(journal), output)
    answers = [json.loads(line) for line in Path(output.destination).read_text().splitlines()]
    prompts = [f"What is the capital of Land {index}?" for index in range(rows)]
    assert [each["completion"] for each in answers] == [
        hashlib.sha256(prompt.encode()).hexdigest()[:12] for prompt in prompts
    ]


def test_shards_cover_all_rows_and_none_is_tiny() -> None:
    assert cut_shards(range(100), 3) == [range(0, 33), range(33, 66), range(66, 100)]
    assert cut_shards(range(10), 8) == [range(10)]
    assert len(cut_shards(range(1_000_000), 1000)) == 1000


def test_another_number_of_shards_goes_on_as_well(tmp_path: Path) -> None:
    batch = Batch(tmp_path, countries(1000))
    run = open_run(claim_journal(batch.journal), batch.job, BatchOptions(shards=4))
    process_shard([InstantEngine()], run.shards[1])
    counts = count_rows(batch.journal, batch.job, cut_shards(range(1000), 2), 0)
    assert [each.rows for each in counts] == [250, 0]
    engine = recording()
    batch.run(engine, shards=3)
    assert len(engine.prompts or ()) == 750
    assert len(batch.publish()) == 1000
