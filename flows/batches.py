"""The flow that puts a table through a model, or through a chain of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from prefect.context import FlowRunContext
from prefect.states import Cancelled
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.flows.forms import form_flow, titled
from prefect_huggingface.tasks.artifacts import publish_markdown
from prefect_huggingface.tasks.batches import (
    BatchPlan,
    hub_of,
    lent_models,
    list_upstream,
    plan_batch,
    publish_batch,
    resolve_models,
    run_shards,
)
from prefect_huggingface.tasks.batching.dates import fill_dates, find_start, warn_of_unfinished
from prefect_huggingface.tasks.batching.job import BatchOptions, InputType, Model, add_models, list_models, pin_model
from prefect_huggingface.tasks.batching.output import (
    Publication,
    check_free,
    describe_batch,
    find_published,
    place_beside,
    publish_artifacts,
)
from prefect_huggingface.tasks.batching.run import BatchMonitor, CancelWatch, check_failures, find_commits, open_run
from prefect_huggingface.tasks.errors import BatchCancelledError
from prefect_huggingface.tasks.estimation import estimate_plan
from prefect_huggingface.tasks.parent_processes import end_with_parent
from prefect_huggingface.tasks.progress import print_summary
from prefect_huggingface.tasks.records import BatchSummary
from prefect_huggingface.tasks.run_logs import run_log
from prefect_huggingface.tasks.storage.journals.journal import Journal
from prefect_huggingface.tasks.storage.journals.ownership import JournalOwner, hold_journal
from prefect_huggingface.tasks.storage.places import Place

# Threads share one engine, so that more of them would not make it faster.
_runner: Any = ThreadPoolTaskRunner(max_workers=4)


@form_flow(name="batch-inference", task_runner=_runner)
def batch_inference(
    model: Annotated[LocalModel | InferenceEndpoint, titled("Model or endpoint")],
    source: Annotated[str, titled("Input file", min_length=1)],
    destination: Annotated[str, titled("Output file", min_length=1)],
    prompt: Annotated[str | None, titled("Prompt template")] = None,
    options: Annotated[GenerationOptions | None, titled("Generation")] = None,
    system: Annotated[str | None, titled("System message")] = None,
    rows: Annotated[Annotated[int, Field(ge=1)] | None, titled("Rows of a trial")] = None,
    more: Annotated[BatchOptions | None, titled("More options")] = None,
) -> BatchSummary:
    """Put every row of a table through a model, or through a chain of prompts, and write the answers beside the rows.

    Finished rows are kept in a journal beside the destination, or on this machine if that is on the Hub. Killed and
    started again with the same parameters, the batch goes on where it was, and its output is the same as without the
    interruption. The same call after its end returns the same summary.

    Dates in `source` and `destination` are those for which the run was scheduled, so that a run that is started again
    finds its files: {date}, {yesterday}, {time}, {year}, {month}, {day}, {hour}, {minute} and {week}. Braces that stand
    for themselves are doubled.

    Args:
        model: Model or endpoint to use.
        source: Input: a JSONL, JSON, CSV, Parquet or Arrow file, a folder or pattern of such files, or an fsspec URL.
        destination: Output file or URL, such as "answers-{date}.jsonl". Its ending tells the format. It must not exist.
        prompt: Template over the columns, such as "What is the capital of {country}?". Other braces are doubled.
        options: Generation options, put over those of the model.
        system: Template of a system message.
        rows: Answer the first rows only, into a file of their own beside the output. The full run takes them over.
        more: Everything that is rarely changed. In Python, its fields may also be given by their own names.

    Returns:
        Counts, and where the output is.

    Raises:
        BatchError: If the batch cannot start or go on.
        ChainError: If the steps do not fit the columns or each other.
        TableError: If the input cannot be read or the output cannot be written.
    """
    return _put_through(model, source, destination, more, prompt=prompt, options=options, system=system, rows=rows)


@form_flow(name="batch-embedding", task_runner=_runner)
def batch_embedding(
    model: Annotated[LocalModel, titled("Model")],
    source: Annotated[str, titled("Input file", min_length=1)],
    destination: Annotated[str, titled("Output file", min_length=1)],
    text: Annotated[str, titled("Text template", min_length=1)],
    input_type: Annotated[InputType, titled("Kind of text")] = "document",
    options: Annotated[GenerationOptions | None, titled("Options")] = None,
    rows: Annotated[Annotated[int, Field(ge=1)] | None, titled("Rows of a trial")] = None,
    more: Annotated[BatchOptions | None, titled("More options")] = None,
) -> BatchSummary:
    """Compute the vector of every row of a table, and write the vectors beside the rows.

    Everything is as for `batch_inference`: the journal, runs that go on where they were killed, dates in the names of
    files, equal texts that are computed once, and shards. The column `embedding` holds the vectors, in Parquet and
    Arrow as lists of a fixed size; it is null for a row that failed.

    Args:
        model: Model with task "feature-extraction".
        source: Input: a JSONL, JSON, CSV, Parquet or Arrow file, a folder or pattern of such files, or an fsspec URL.
        destination: Output file or URL that ends with .parquet, .arrow or .jsonl. It must not exist.
        text: Template over the columns, "{title}: {body}" for instance. Other braces are doubled.
        input_type: Whether the texts are documents or queries, which some models have different prompts for.
        options: `context_overflow` says what happens to texts that are too long.
        rows: Compute the first rows only, into a file of their own beside the output.
        more: Everything that is rarely changed. In Python, its fields may also be given by their own names.
    """
    return _put_through(
        model, source, destination, more, prompt=text, options=options, rows=rows, input_type=input_type
    )


@form_flow(name="batch-rerank", task_runner=_runner)
def batch_rerank(
    model: Annotated[LocalModel, titled("Model")],
    source: Annotated[str, titled("Input file", min_length=1)],
    destination: Annotated[str, titled("Output file", min_length=1)],
    query: Annotated[str, titled("Query template", min_length=1)],
    text: Annotated[str, titled("Text template", min_length=1)],
    options: Annotated[GenerationOptions | None, titled("Options")] = None,
    rows: Annotated[Annotated[int, Field(ge=1)] | None, titled("Rows of a trial")] = None,
    more: Annotated[BatchOptions | None, titled("More options")] = None,
) -> BatchSummary:
    """Score how well the text of every row of a table answers its query, and write the scores beside the rows.

    Everything is as for `batch_inference`. The column `score` holds the scores, the higher the better; it is null for a
    row that failed.

    Args:
        model: Model with task "text-ranking".
        source: Input: a JSONL, JSON, CSV, Parquet or Arrow file, a folder or pattern of such files, or an fsspec URL.
        destination: Output file or URL. Its ending tells the format. It must not exist.
        query: Template over the columns of what is asked, "{question}" for instance. Other braces are doubled.
        text: Template over the columns of what is scored, "{title}: {body}" for instance.
        options: `context_overflow` says what happens to pairs that are too long.
        rows: Score the first rows only, into a file of their own beside the output.
        more: Everything that is rarely changed. In Python, its fields may also be given by their own names.
    """
    return _put_through(model, source, destination, more, prompt=query, options=options, rows=rows, pair=text)


def _put_through(model: Model, source: str, destination: str, more: BatchOptions | None, **asked: Any) -> BatchSummary:
    """Plan a batch and run it, in the journal of its output."""
    more = more or BatchOptions()
    end_with_parent()
    start, template = find_start(more.time_zone), destination
    source, destination = fill_dates("source", source, start), fill_dates("destination", destination, start)
    with hub_of(model):
        warn_of_unfinished(template, destination)
        journal = Journal.beside(destination)
        check_free(destination, replaceable=bool(journal.list_published()))
        plan = plan_batch(model, source, destination, more=more, **asked)
        with hold_journal(journal, more.if_running) as owner:
            return _answer(plan, list_models(model, more.steps or ()), destination, owner, more)


def _answer(
    plan: BatchPlan, models: Sequence[Model], destination: str, owner: JournalOwner, more: BatchOptions
) -> BatchSummary:
    """Resolve the models and run the batch, unless the same call has published its output before."""
    published = find_published(owner.journal, Place.of(destination))
    is_finished = plan.chosen is None and published.get("call") == plan.job.call_key(plan.output)
    if is_finished and not (more.retry_failed and published["summary"]["failed"]):
        summary = BatchSummary(**published["summary"])
        run_log().info("The batch is finished already: its output is %s.", summary.destination)
        publish_markdown("batch-summary", describe_batch(summary, None, (), owner.journal), "Summary of the batch")
    else:
        replaceable = more.retry_failed and bool(published) and owner.journal.read_job() is not None
        _check_places(plan, owner.journal, destination, replaceable)
        resolved = resolve_models(models, find_commits(owner.journal, plan.job))
        plan = replace(plan, job=add_models(plan.job, models, resolved))
        pinned = [pin_model(each, found.commits) for each, found in zip(models, resolved, strict=True)]
        try:
            summary = _run(plan, pinned, owner, more, replaceable).summary
        except BatchCancelledError as exc:
            return Cancelled(message=exc.message)  # type: ignore[return-value]  # as it is on the server
    is_kept = more.keep_journal == "always" or (more.keep_journal == "failed" and summary.failed > 0)
    if plan.chosen is None and not is_kept:
        owner.clear()
    if more.show_progress:
        print_summary(summary)
    return summary


def _check_places(plan: BatchPlan, journal: Journal, destination: str, replaceable: bool) -> None:
    """Check that there is nothing where the files of the output go, but what this very batch replaces."""
    check_free(destination, replaceable)
    if plan.job.table.format == "openai" and plan.chosen is None:
        # With a journal, they are from an attempt of this job that ended between the two files.
        began = journal.read_job() is not None
        check_free(place_beside(Place.of(destination).url, "errors"), replaceable or began)


def _run(
    plan: BatchPlan, models: Sequence[Model], owner: JournalOwner, more: BatchOptions, replaceable: bool
) -> Publication:
    """Generate what is left and publish the output."""
    run = open_run(owner, plan.job, more, plan.chosen)
    monitor = BatchMonitor(owner.journal, run.rows, run.counts)
    if run.counts.rows:
        left = run.rows - run.counts.rows
        run_log().info("%d of %d rows are finished already, %d are left.", run.counts.rows, run.rows, left)
    check_failures(monitor.measure(), more.max_failures, more.min_valid)
    with lent_models(models) as lent, CancelWatch() as watch:
        if more.estimate and run.shards:
            _estimate(plan, models, more, watch)
        progress = run_shards(lent, run, monitor, watch, more)
    publication: Publication = publish_batch(plan, owner, replaceable, progress, list_upstream(plan, models))
    publish_artifacts(publication, monitor.samples, owner.journal)
    return publication


def _estimate(plan: BatchPlan, models: Sequence[Model], more: BatchOptions, watch: CancelWatch) -> None:
    """Measure what the whole batch takes, where this process is the one that answers."""
    context = FlowRunContext.get()
    if context is not None and not isinstance(context.task_runner, ThreadPoolTaskRunner):
        run_log().warning(
            "`estimate` measures this process, and the shards run in others. Call `estimate_batch` there."
        )
        return
    estimate_plan(plan.job, models, more, should_stop=watch.is_cancelled)
