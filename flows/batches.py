"""The flow that puts a table through a model."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

from prefect.futures import PrefectFuture
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.flows.forms import form_flow, titled
from prefect_huggingface.tasks.artifacts import ProgressReport
from prefect_huggingface.tasks.batches import ENGINE_TAG, BatchPlan, plan_batch, publish_batch, run_shard
from prefect_huggingface.tasks.batching.dates import fill_dates, find_start, warn_of_unfinished
from prefect_huggingface.tasks.batching.monitors import BatchMonitor, Progress
from prefect_huggingface.tasks.batching.plans import check_free, check_places, may_replace
from prefect_huggingface.tasks.batching.publications import Publication
from prefect_huggingface.tasks.batching.runs import BatchRun, check_failures, open_run
from prefect_huggingface.tasks.batching.shards import ShardResult, ShardSettings
from prefect_huggingface.tasks.batching.summaries import KeepJournal, is_kept, publish_artifacts, summarize
from prefect_huggingface.tasks.errors import BatchError
from prefect_huggingface.tasks.parent_processes import end_with_parent
from prefect_huggingface.tasks.progress import ProgressBar, describe, print_summary
from prefect_huggingface.tasks.records import BatchSummary
from prefect_huggingface.tasks.run_logs import run_log
from prefect_huggingface.tasks.storage.journals.journal import Journal
from prefect_huggingface.tasks.storage.journals.ownership import IfRunning, hold_journal
from prefect_huggingface.tasks.storage.tables.inputs import SourceOptions, TableFormat
from prefect_huggingface.tasks.waiting import WaitNotice

# A shard that has not begun by then waits for something.
START_SECONDS = 5.0
# Threads share one engine, so that more of them would not make it faster.
_runner: Any = ThreadPoolTaskRunner(max_workers=4)


@form_flow(name="batch-inference", task_runner=_runner)
def batch_inference(
    model: Annotated[LocalModel | InferenceEndpoint, titled("Model or endpoint")],
    source: Annotated[str, titled("Input file", min_length=1)],
    destination: Annotated[str, titled("Output file", min_length=1)],
    prompt: Annotated[str | None, titled("Prompt template")] = None,
    options: Annotated[GenerationOptions | None, titled("Generation")] = None,
    source_format: Annotated[TableFormat | None, titled("Format of the input")] = None,
    source_options: Annotated[SourceOptions | None, titled("Delimiter and encoding of the input")] = None,
    messages_column: Annotated[str | None, titled("Column with chat messages")] = None,
    system: Annotated[str | None, titled("System message")] = None,
    option_columns: Annotated[list[str] | None, titled("Columns with options")] = None,
    id_column: Annotated[str | None, titled("Column with unique ids")] = None,
    columns: Annotated[list[str] | None, titled("Columns to keep")] = None,
    output_prefix: Annotated[str, titled("Prefix of the added columns")] = "",
    timings: Annotated[bool, titled("Measure each row")] = False,
    shards: Annotated[int, titled("Number of shards", ge=1, le=10_000)] = 1,
    in_flight: Annotated[Annotated[int, Field(ge=1)] | None, titled("Rows at once")] = None,
    deduplicate: Annotated[bool, titled("Answer equal prompts once")] = True,
    ordered: Annotated[bool, titled("Sort by shared beginnings")] = True,
    max_failures: Annotated[Annotated[float, Field(gt=0)] | None, titled("Failures before giving up")] = None,
    retry_failed: Annotated[bool, titled("Retry failed rows")] = False,
    keep_journal: Annotated[KeepJournal, titled("Keep the journal")] = "failed",
    if_running: Annotated[IfRunning, titled("If the batch runs already")] = "refuse",
    show_progress: Annotated[bool, titled("Progress bar in the terminal")] = True,
    time_zone: Annotated[str, titled("Time zone of the dates")] = "UTC",
) -> BatchSummary:
    """Put every row of a table through a model and write the answers beside the rows.

    Finished rows are kept in a journal beside the destination. Killed and started again with the same parameters, the
    batch goes on where it was, and its output is the same as without the interruption.

    Dates in `source` and `destination` are those for which the run was scheduled, so that a run that is started again
    finds its files: {date}, {yesterday}, {time}, {year}, {month}, {day}, {hour}, {minute} and {week}. Braces that stand
    for themselves are doubled.

    Args:
        model: Model or endpoint to use.
        source: Input: a JSONL, JSON, CSV, Parquet or Arrow file, a folder or pattern of such files, or an fsspec URL.
        destination: Output file or URL, such as "answers-{date}.jsonl". Its ending tells the format. It must not exist.
        prompt: Template over the columns, such as "What is the capital of {country}?". Other braces are doubled.
        options: Generation options, put over those of the model.
        source_format: Format of the input where the file names do not tell it.
        source_options: Delimiter and encoding of text files, where they are not found out.
        messages_column: Column with a list of chat messages, in place of the prompt.
        system: Template of a system message.
        option_columns: Columns that hold the generation option of the same name for each row.
        id_column: Column whose values must be unique.
        columns: Columns of the input to keep in the output. All when left empty.
        output_prefix: Text before the names of the columns that are added.
        timings: Fill the column `seconds`. Times differ from run to run, and with them the bytes of the output.
        shards: Number of parts that free workers take one by one. Several times the number of workers is good.
        in_flight: Number of rows that are in the engine at once. The engine's own number when left empty.
        deduplicate: Generate equal prompts once.
        ordered: Generate rows with a shared beginning together.
        max_failures: Give up when more rows than this have failed; below 1 it is a share of all rows.
        retry_failed: Generate the rows that failed in an earlier run again. Needs its journal.
        keep_journal: Whether the journal stays at the end: always, never, or if rows failed.
        if_running: What to do while another run works on the same destination: refuse or wait.
        show_progress: Show a progress bar and a closing table in the terminal.
        time_zone: Time zone of the dates in `source` and `destination`, such as Europe/Berlin.

    Returns:
        Counts, and where the output is.

    Raises:
        BatchError: If the batch cannot start or go on.
        TableError: If the input cannot be read or the output cannot be written.
    """
    start, template = find_start(time_zone), destination
    end_with_parent()
    source, destination = fill_dates("source", source, start), fill_dates("destination", destination, start)
    warn_of_unfinished(template, destination)
    journal = Journal.beside(destination)
    replace = may_replace(journal, destination, retry_failed)
    check_free(destination, replace)
    plan = plan_batch(
        model, source, destination, prompt, options, source_format=source_format, source_options=source_options,
        messages_column=messages_column, system=system, option_columns=option_columns or (), columns=columns,
        output_prefix=output_prefix, timings=timings, id_column=id_column,
    )  # fmt: skip
    with hold_journal(journal, if_running) as owner:
        check_places(plan.job, plan.output, journal, replace)
        run = open_run(owner, plan.job, shards, retry_failed, ShardSettings(in_flight, deduplicate, ordered))
        monitor = BatchMonitor(journal, plan.job.table.rows, run.finished)
        if run.finished:
            run_log().info("%d of %d rows are finished already, %d are left.", *_counts(plan, run))
        results = _run_shards(model, plan, run, monitor, max_failures, show_progress)
        publication: Publication = publish_batch(plan, owner, replace)
        seconds = max((each.ended for each in results), default=0) - min((each.began for each in results), default=0)
        summary = summarize(plan.output.destination, publication, run.finished, monitor.measure().tokens, seconds)
        publish_artifacts(summary, publication, monitor, journal)
        if not is_kept(keep_journal, summary):
            owner.remove()
    if show_progress:
        print_summary(summary)
    return summary


def _counts(plan: BatchPlan, run: BatchRun) -> tuple[int, int, int]:
    rows = plan.job.table.rows
    return run.finished, rows, rows - run.finished


def _run_shards(
    model: LocalModel | InferenceEndpoint,
    plan: BatchPlan,
    run: BatchRun,
    monitor: BatchMonitor,
    max_failures: float | None,
    show: bool,
) -> list[ShardResult]:
    """Hand the shards to the workers and watch them. Whatever happens, they end and commit what is finished."""
    rows = plan.job.table.rows
    report = ProgressReport("batch-progress", f"{rows:,} rows")
    finished: queue.SimpleQueue[PrefectFuture[Any]] = queue.SimpleQueue()
    futures = [run_shard.submit(model, run.journal.place.url, shard) for shard in run.shards]
    for future in futures:
        future.add_done_callback(finished.put)
    results: list[ShardResult] = []
    start = _StartWatch(futures)
    with ProgressBar("rows", rows, show) as bar:

        def tell(final: bool = False) -> Progress:
            progress = monitor.measure()
            bar.update(progress)
            report.update(progress.share, describe(progress), final=final)
            return progress

        try:
            while len(results) < len(futures):
                try:
                    results.append(finished.get(timeout=run.journal.poll_seconds).result())
                except queue.Empty:
                    start.look()
                check_failures(tell().failed, rows, max_failures)
        except BaseException as exc:
            _end_shards(run, futures, type(exc).__name__)
            raise
        finally:
            tell(final=True)
    if not all(result.complete for result in results):
        raise BatchError(
            f"The batch was stopped, or taken over by another run. {run.journal.place.url!r} keeps its rows."
        )
    return results


def _end_shards(run: BatchRun, futures: Sequence[PrefectFuture[Any]], cause: str) -> None:
    """Ask the shards to end, and wait until they have committed what is finished."""
    run.owner.request_stop(cause)
    for future in futures:
        future.wait()


class _StartWatch:
    """Says so in the log as long as no shard has begun."""

    def __init__(self, futures: Sequence[PrefectFuture[Any]]) -> None:
        self._first = futures[0] if futures else None
        what = f"No shard has begun: waiting for a free worker, or for the concurrency limit on the tag {ENGINE_TAG!r}"
        self._notice = WaitNotice(run_log(), what, START_SECONDS)

    def look(self) -> None:
        """Ask Prefect for the first shard, until it has begun."""
        if self._first is None:
            return
        with suppress(Exception):  # a server that is busy answers the next time
            state = self._first.state  # each look at it is a request to the server
            if state.is_pending() or state.is_scheduled():
                self._notice.tell()
            else:
                self._first = None
