"""What a batch would take: tokens, time, memory and disk, from a short measurement on rows drawn at random."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.artifacts import markdown_table, publish_markdown
from prefect_huggingface.tasks.batches import ENGINE_TAG, hub_of
from prefect_huggingface.tasks.batching.job import (
    BatchJob,
    BatchOptions,
    InputType,
    Model,
    describe_models,
    list_models,
    plan_job,
)
from prefect_huggingface.tasks.batching.requests import RowRequest
from prefect_huggingface.tasks.batching.shard import FeedChunk, Room, RowFeed, run_requests
from prefect_huggingface.tasks.engines.base import OnText
from prefect_huggingface.tasks.errors import BatchCancelledError
from prefect_huggingface.tasks.progress import format_seconds
from prefect_huggingface.tasks.records import Completion
from prefect_huggingface.tasks.run_logs import library_logs
from prefect_huggingface.tasks.storage.journals.journal import ResultRow
from prefect_huggingface.tasks.storage.places import Place
from prefect_huggingface.tasks.storage.tables.inputs import Chunk, read_chunks

LEAST_ROWS, MOST_ROWS = 64, 1024
ROUNDS = 4  # measured rows, as a multiple of those that an engine has at once
JOURNAL_BYTES = 100  # of a row in the journal, besides its text


@dataclass(frozen=True, slots=True)
class BatchEstimate:
    """What a batch would take.

    Attributes:
        measured_rows: Number of rows that were measured.
        seconds: Time from the first request to the last answer, on one machine like this.
        memory_bytes: Resident memory of the process with the loaded model.
        disk_bytes: Size of the journal and the output together.
    """

    rows: int
    measured_rows: int
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    memory_bytes: int
    disk_bytes: int


def measure_batch(
    model: Model,
    source: str,
    prompt: str | None = None,
    options: GenerationOptions | None = None,
    system: str | None = None,
    more: BatchOptions | None = None,
    max_seconds: float = 60.0,
    input_type: InputType | None = None,
    pair: str | None = None,
) -> BatchEstimate:
    """Estimate what `batch_inference` would take with the same parameters.

    For `batch_embedding`, `prompt` is its text and `input_type` the kind of text; for `batch_rerank`, `prompt` is its
    query and `pair` its text. After `max_seconds` no more rows begin; those that have begun are finished.

    Raises:
        BatchError: If the parts do not go together.
        TableError: If the input cannot be read.
    """
    more = more or BatchOptions()
    models = list_models(model, more.steps or ())
    with hub_of(model):
        job = plan_job(source, prompt, system, options, more, input_type, pair)
        return measure_job(describe_models(job, models, more.served_names), models, more, max_seconds)


def measure_job(
    job: BatchJob,
    models: Sequence[Model],
    more: BatchOptions,
    max_seconds: float = 60.0,
    should_stop: Callable[[], bool] = lambda: False,
) -> BatchEstimate:
    """Estimate what a planned batch takes, and leave it as an artifact.

    Rows drawn at random are generated, several times as many as the engine has at once. The rate is that of the time in
    which its batch is full; of rows that run then, the part counts that is done. Their answers are not kept; a trial,
    `rows=200`, keeps them. Equal prompts are not looked for. `should_stop` is asked now and then.

    Raises:
        BatchCancelledError: If it was stopped.
    """
    from prefect_huggingface.tasks.engines.registry import load_engine, used_bytes

    with library_logs():
        engines = [load_engine(each) for each in models]
    limit = more.max_concurrency or sum(engine.in_flight for engine in engines)
    number = min(job.table.rows, MOST_ROWS, max(ROUNDS * limit, LEAST_ROWS))
    meter = _Meter([isinstance(each, LocalModel) for each in models])
    feed = RowFeed(job.make_requests(), _draw_rows(job, number), meter.results.extend, group_by_prefix=False)
    with closing(run_requests(engines, feed, Room(limit), should_stop, meter.listen)) as finished:
        for completions in finished:
            meter.finish(completions)
            feed.finish(completions)
            if meter.now() > max_seconds:
                # What has begun is finished: those that end first are the shortest.
                feed.end()
    if should_stop():
        raise BatchCancelledError("The batch was stopped while it was measured. No row was answered yet.")
    estimate = _extrapolate(job, meter, used_bytes())
    publish_markdown("batch-estimate", describe_estimate(estimate), f"What a batch of {job.table.source} takes")
    return estimate


class _Meter:
    """Notes when requests were made, when their text came, and when they ended, in seconds.

    Endpoints, the others of `is_local`, are asked as a batch asks them: without a stream.
    """

    def __init__(self, is_local: Sequence[bool]) -> None:
        self._is_local, self._began = is_local, time.monotonic()
        self._texts: dict[int, list[float]] = {}
        self._ends: dict[int, float] = {}
        self._last_begin = 0.0
        self.results: list[ResultRow] = []

    def now(self) -> float:
        return time.monotonic() - self._began

    def listen(self, asked: RowRequest) -> OnText | None:
        times = self._texts[asked.number] = []
        self._last_begin = self.now()
        return (lambda _: times.append(self.now())) if self._is_local[asked.engine] else None

    def finish(self, completions: Sequence[Completion]) -> None:
        self._ends.update((int(each.request_id or 0), self.now()) for each in completions)

    @property
    def rows(self) -> int:
        return sum(row.is_last for row in self.results)

    @property
    def first_end(self) -> float:
        return min(self._ends.values(), default=0.0)

    @property
    def last_end(self) -> float:
        return max(self._ends.values(), default=0.0)

    def rate(self) -> float:
        """Return the rows per second while new ones began, so that the batch was full."""
        if not self._ends:  # no row could be asked
            return self.rows / max(self.now(), 1e-6)
        full = max(self._last_begin, self.first_end)
        done = sum(self._share(number, full) for number in self._ends)
        return done / len(self._ends) * self.rows / max(full, 1e-6)

    def _share(self, number: int, at: float) -> float:
        """Return how much of a request was done at a time, from 0 to 1."""
        times = self._texts[number]
        if self._ends[number] <= at or not times:
            return float(self._ends[number] <= at)
        return sum(each <= at for each in times) / len(times)


def _draw_rows(job: BatchJob, number: int) -> Iterator[FeedChunk]:
    """Yield rows that are drawn at random, in random order: they would come by length else, or by topic."""
    drawn = tuple(sorted(random.Random(0).sample(range(job.table.rows), number)))
    rows = [(chunk.rows[0], chunk.problems.get(0)) for chunk in read_chunks(job.table, drawn)]
    random.Random(1).shuffle(rows)
    problems = {place: problem for place, (_, problem) in enumerate(rows) if problem}
    yield Chunk(0, len(rows), lambda: [row for row, _ in rows], problems=problems), []


def _extrapolate(job: BatchJob, meter: _Meter, memory_bytes: int) -> BatchEstimate:
    rows, measured, results = job.table.rows, max(meter.rows, 1), meter.results
    factor = rows / measured
    # The batch empties at the end.
    seconds = meter.last_end if measured >= rows else rows / max(meter.rate(), 1e-6) + meter.first_end / 2
    text = sum(len((row.completion or row.error or "").encode("utf-8", "replace")) for row in results)
    source = sum(Place(file.url).info()["size"] for file in job.table.files)
    return BatchEstimate(
        rows, measured,
        prompt_tokens=round(factor * sum(row.prompt_tokens for row in results)),
        generated_tokens=round(factor * sum(row.generated_tokens for row in results)),
        seconds=seconds, memory_bytes=memory_bytes,
        disk_bytes=round(source + factor * (2 * text + 2 * JOURNAL_BYTES * len(results))),
    )  # fmt: skip


def describe_estimate(estimate: BatchEstimate) -> str:
    """Return an estimate as Markdown."""
    lines = [
        ("Rows", f"{estimate.rows:,}, of which {estimate.measured_rows:,} were measured"),
        ("Time", format_seconds(estimate.seconds)),
        ("Prompt tokens", f"{estimate.prompt_tokens:,}"),
        ("Generated tokens", f"{estimate.generated_tokens:,}"),
        ("Memory", f"{estimate.memory_bytes / 1e9:.2f} GB"),
        ("Disk", f"{estimate.disk_bytes / 1e6:.1f} MB"),
    ]
    return "\n\n".join(["# What the batch takes", markdown_table(("", ""), lines)])


_settings: dict[str, Any] = {"tags": [ENGINE_TAG], "cache_policy": NO_CACHE, "persist_result": False}

estimate_batch = task(name="estimate-batch", **_settings)(measure_batch)
estimate_plan = task(name="estimate-plan", **_settings)(measure_job)
