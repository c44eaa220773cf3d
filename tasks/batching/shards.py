"""One shard: a range of rows that one worker runs through one engine, committing as it goes."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass

from prefect_huggingface.blocks import GenerationOptions
from prefect_huggingface.tasks.batching.feeds import RowFeed
from prefect_huggingface.tasks.batching.garbage import rare_collections
from prefect_huggingface.tasks.batching.jobs import BatchJob
from prefect_huggingface.tasks.batching.openai_requests import OpenAIRows
from prefect_huggingface.tasks.batching.prompts import PromptRows, RequestMaker
from prefect_huggingface.tasks.engines.base import Engine, RequestError
from prefect_huggingface.tasks.errors import BatchError, EngineError
from prefect_huggingface.tasks.records import Completion, Request
from prefect_huggingface.tasks.storage.journals.duplicates import ResultIndex
from prefect_huggingface.tasks.storage.journals.journal import Journal, JournalRows, JournalWriter, ResultRow
from prefect_huggingface.tasks.storage.tables.inputs import Chunk, read_chunks

STOP_CHECK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class ShardSettings:
    """How a shard goes through its rows. None of it changes the output.

    Attributes:
        in_flight: Upper limit of requests that are queued or running, or None for the engine's own.
        deduplicate: Whether equal prompts are generated once.
        ordered: Whether rows with a shared beginning are generated together.
    """

    in_flight: int | None = None
    deduplicate: bool = True
    ordered: bool = True


@dataclass(frozen=True, slots=True)
class Shard:
    """A range of rows of a batch.

    Attributes:
        start: First row.
        stop: Row after the last.
        owner: Run that it belongs to.
        epoch: Number of that run.
        retry_before: Rows that failed in a run before this one are generated again.
        settings: How to go through the rows.
    """

    start: int
    stop: int
    owner: str
    epoch: int
    retry_before: int = 0
    settings: ShardSettings = ShardSettings()


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What a shard came to.

    Attributes:
        start: First row.
        stop: Row after the last.
        finished: Number of its rows that are in the journal.
        began: When its engine began, in seconds since 1970.
        ended: When its last row was committed.
    """

    start: int
    stop: int
    finished: int
    began: float
    ended: float

    @property
    def complete(self) -> bool:
        """Whether all rows are finished."""
        return self.finished == self.stop - self.start


def process_shard(engine: Engine, journal: Journal, shard: Shard) -> ShardResult:
    """Generate the rows of a shard that are not in the journal yet.

    It ends early, with what is finished committed, when the journal asks for it.
    """
    began = time.time()
    record = journal.read_job() or {}
    job = BatchJob.from_dict(record)
    check_template(engine, job)
    names = [name for name in journal.names() if name.last >= shard.start and name.first < shard.stop]
    should_stop = _StopCheck(journal, shard.epoch, shard.owner)
    done = _Done(JournalRows(journal, job.key, names), shard.retry_before, should_stop)
    finished = 0
    with ExitStack() as stack:
        stack.enter_context(rare_collections())
        writer = stack.enter_context(JournalWriter(journal, job.key, shard.epoch))
        index = stack.enter_context(ResultIndex()) if shard.settings.deduplicate else None

        def commit(answers: list[ResultRow]) -> None:
            nonlocal finished
            finished += len(answers)
            writer.add(answers)

        feed = RowFeed(make_requests(job), commit, index, shard.settings.ordered)
        chunks = done.skip(read_chunks(job.table, shard.start, shard.stop), feed)
        in_flight = shard.settings.in_flight or engine.in_flight
        finished_requests = run_requests(engine, feed.requests(chunks), in_flight, should_stop)
        for completions in stack.enter_context(closing(finished_requests)):
            feed.finish(completions)
    return ShardResult(shard.start, shard.stop, finished + done.rows, began, time.time())


def check_template(engine: Engine, job: BatchJob) -> None:
    """Refuse a system message, or variables of the template, that the model cannot take, before the first row.

    Raises:
        BatchError: With what the template says.
    """
    if engine.inputs is None or (job.system is None and not job.options.get("template_options")):
        return
    system = [{"role": "system", "content": "Be brief."}] if job.system is not None else []
    probe = Request(messages=[*system, {"role": "user", "content": "Hello"}], options=GenerationOptions(**job.options))
    try:
        engine.inputs.write(probe, probe.options)
    except RequestError as exc:
        raise BatchError(f"No row can be asked: {exc}") from None


def make_requests(job: BatchJob) -> RequestMaker:
    """Return what makes the requests of a job's rows."""
    return OpenAIRows(job) if job.table.format == "openai" else PromptRows(job)


def run_requests(
    engine: Engine, requests: Iterable[Request], in_flight: int, should_stop: Callable[[], bool]
) -> Generator[list[Completion], None, None]:
    """Yield what has finished, like `Engine.generate`, until there is no more or it has to stop.

    It looks for a stop also while every request takes long. Closing the iterator cancels those under way.

    Raises:
        EngineError: If the engine was closed, or can be used no more.
    """
    finished: queue.SimpleQueue[Future[Completion]] = queue.SimpleQueue()
    pending: set[Future[Completion]] = set()
    source = iter(requests)
    try:
        while not should_stop():
            for request in itertools.islice(source, in_flight - len(pending)):
                future = engine.submit(request)
                pending.add(future)
                future.add_done_callback(finished.put)
            if not pending:
                return
            try:
                done = [finished.get(timeout=STOP_CHECK_SECONDS)]
            except queue.Empty:
                continue
            while not finished.empty():
                done.append(finished.get())
            pending.difference_update(done)
            yield from _finished_rows(engine, [future.result() for future in done])
    finally:
        for future in pending:
            future.cancel()


def _finished_rows(engine: Engine, completions: list[Completion]) -> Iterator[list[Completion]]:
    """Yield what is finished; what an engine that was closed, or failed for good, leaves undone is for the next run."""
    finished = [
        one
        for one in completions
        if one.error_code != "cancelled" and not (engine.failure is not None and one.error == engine.failure)
    ]
    if finished:
        yield finished
    if len(finished) < len(completions):
        raise EngineError(f"{engine.failure or 'The engine was closed while the batch ran.'} Run it again.")


class _StopCheck:
    """Asks the journal now and then."""

    def __init__(self, journal: Journal, epoch: int, owner: str) -> None:
        self._journal, self._epoch, self._owner = journal, epoch, owner
        self._next = 0.0

    def __call__(self) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self._journal.poll_seconds
        return self._journal.is_stopped(self._epoch, self._owner)


class _Done:
    """The rows of a shard that an earlier run has finished."""

    def __init__(self, sweep: JournalRows, retry_before: int, should_stop: Callable[[], bool]) -> None:
        self._sweep, self._retry_before, self._should_stop = sweep, retry_before, should_stop
        self.rows = 0

    def skip(self, chunks: Iterable[Chunk], feed: RowFeed) -> Iterator[tuple[Chunk, set[int]]]:
        """Yield each chunk with the numbers of its rows that are done, and let the feed learn their answers."""
        for chunk in chunks:
            if self._should_stop():
                return
            done = set()
            for row in self._sweep.take(chunk.first, chunk.first + len(chunk)).to_pylist():
                if row["error"] is None:
                    feed.learn(row)
                elif row["epoch"] < self._retry_before:
                    continue
                done.add(row["row"])
            self.rows += len(done)
            yield chunk, done
