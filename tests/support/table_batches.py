"""A batch without a model: from an input to its output through the plan, a journal and the publication."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect_huggingface.tasks.batching.job import BatchJob, BatchOptions, Output, plan_job
from prefect_huggingface.tasks.batching.output import Publication, choose_columns, plan_output, publish_output
from prefect_huggingface.tasks.batching.run import open_run
from prefect_huggingface.tasks.batching.shard import process_shard
from prefect_huggingface.tasks.storage.journals.journal import Journal
from prefect_huggingface.tasks.storage.journals.ownership import hold_journal
from support.instant_engines import InstantEngine


def answer_table(
    source: str | Path,
    destination: str | Path,
    prompt: str,
    answer: str | None = "yes",
    columns: Sequence[str] | None = None,
    prefix: str = "",
    **reading: Any,
) -> Publication:
    """Put a table through an engine that gives the same answer to everything, and publish its output."""
    output = plan_output(str(source), str(destination))
    more = BatchOptions(
        source_options=reading.pop("source_options", None), source_format=reading.pop("format", None),
        columns=columns, output_prefix=prefix,
    )  # fmt: skip
    job = plan_job(str(source), prompt, more=more, **reading)
    return answer_job(job, choose_columns(job, output, more), InstantEngine(answer))


def answer_job(job: BatchJob, output: Output, engine: InstantEngine) -> Publication:
    """Put a job through an engine, and publish its output."""
    with hold_journal(Journal.beside(output.destination)) as owner:
        for shard in open_run(owner, job).shards:
            process_shard([engine], shard)
        return publish_output(job, owner, output)
