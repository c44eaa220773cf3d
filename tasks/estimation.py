"""What a batch would take: tokens, time, memory and disk, from a short measurement on rows drawn at random."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.tasks.artifacts import markdown_table, publish_markdown
from prefect_huggingface.tasks.batching.job import BatchJob, BatchOptions, describe_models, list_models, plan_job
from prefect_huggingface.tasks.batching.shard import FeedChunk, RowFeed, run_requests
from prefect_huggingface.tasks.progress import format_seconds
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
    model: LocalModel | InferenceEndpoint,
    source: str,
    prompt: str | None = None,
    options: GenerationOptions | None = None,
    system: str | None = None,
    more: BatchOptions | None = None,
    max_seconds: float = 60.0,
) -> BatchEstimate:
    """Estimate what `batch_inference` would take with the same parameters.

    Rows drawn at random are generated, several times as many as the engine has at once, so that its batch is full while
    the time is taken. Their answers are not kept; a trial, `rows=200`, keeps them. Equal prompts are not looked for.
    After `max_seconds` no more rows begin; those that have begun are finished.

    Raises:
        BatchError: If the parts do not go together.
        TableError: If the input cannot be read.
    """
    from prefect_huggingface.tasks.engines.memory import resident_bytes
    from prefect_huggingface.tasks.engines.registry import load_engine

    more = more or BatchOptions()
    models = list_models(model, more.steps or ())
    job = describe_models(plan_job(source, prompt, system, options, more), models, more.served_names)
    with library_logs():
        engines = [load_engine(each) for each in models]
    limit = more.max_concurrency or sum(engine.in_flight for engine in engines)
    number = min(job.table.rows, MOST_ROWS, max(ROUNDS * limit, LEAST_ROWS))
    results: list[ResultRow] = []
    ends: list[float] = []

    def commit(rows: list[ResultRow]) -> None:
        results.extend(rows)
        ends.extend(time.monotonic() for row in rows if row.is_last)

    began = time.monotonic()
    feed = RowFeed(job.make_requests(), _draw_rows(job, number), commit, group_by_prefix=False)
    with closing(run_requests(engines, feed, limit, lambda: False)) as finished:
        for completions in finished:
            feed.finish(completions)
            if time.monotonic() - began > max_seconds:
                # What has begun is finished: those that end first are the shortest.
                feed.end()
    estimate = _extrapolate(job, results, [each - began for each in ends], resident_bytes())
    publish_markdown("batch-estimate", describe_estimate(estimate), f"What a batch of {source} takes")
    return estimate


def _draw_rows(job: BatchJob, number: int) -> Iterator[FeedChunk]:
    """Yield rows that are drawn at random, in random order: they would come by length else, or by topic."""
    drawn = frozenset(random.Random(0).sample(range(job.table.rows), number))
    rows: list[tuple[dict[str, Any], str | None]] = []
    for chunk in read_chunks(job.table):
        picked = [place for place in range(len(chunk)) if chunk.first + place in drawn]
        rows += [(chunk.rows[place], chunk.problems.get(place)) for place in picked]
    random.Random(1).shuffle(rows)
    problems = {place: problem for place, (_, problem) in enumerate(rows) if problem}
    yield Chunk(0, len(rows), lambda: [row for row, _ in rows], problems=problems), set(), []


def _extrapolate(job: BatchJob, results: list[ResultRow], ends: list[float], memory_bytes: int) -> BatchEstimate:
    rows, measured = job.table.rows, max(len(ends), 1)
    factor = rows / measured
    if measured >= rows:
        seconds = ends[-1] if ends else 0.0
    else:
        # In the middle the batch of the engine is full: it has filled, and no place is empty yet.
        first, last = measured // 4, measured * 3 // 4
        rate = (last - first) / max(ends[last] - ends[first], 1e-6) if last > first else measured / max(ends[-1], 1e-6)
        seconds = rows / rate + ends[0]
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


estimate_batch = task(name="estimate-batch", cache_policy=NO_CACHE, persist_result=False)(measure_batch)
