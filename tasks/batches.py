"""Tasks of a batch: plan it, run its shards, publish its output, and look at its journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint, LocalModel
from prefect_huggingface.tasks.assets import model_keys, note_asset, place_key
from prefect_huggingface.tasks.batching.identities import identify_model, is_greedy, name_backend, name_model
from prefect_huggingface.tasks.batching.jobs import BatchJob, get_versions
from prefect_huggingface.tasks.batching.plans import check_ids, choose_columns, plan_job, plan_output
from prefect_huggingface.tasks.batching.publications import Output, Publication, get_fields, publish_output
from prefect_huggingface.tasks.batching.shards import Shard, ShardResult, process_shard
from prefect_huggingface.tasks.batching.statuses import get_status
from prefect_huggingface.tasks.downloads import HUB_RETRIES
from prefect_huggingface.tasks.run_logs import library_logs
from prefect_huggingface.tasks.storage.journals.journal import Journal
from prefect_huggingface.tasks.storage.journals.ownership import JournalOwner
from prefect_huggingface.tasks.storage.tables.inputs import SourceOptions, TableFormat

ENGINE_TAG = "hugging-face-engine"
"""Tag of the tasks that load a model. A concurrency limit on it keeps a machine from loading two by accident."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What a batch will do: its job and its output, all checked, and the assets that it reads."""

    job: BatchJob
    output: Output
    upstream: tuple[str, ...] = ()


def check_batch(
    model: LocalModel | InferenceEndpoint,
    source: str,
    destination: str,
    prompt: str | None,
    options: GenerationOptions | None = None,
    *,
    source_format: TableFormat | None = None,
    source_options: SourceOptions | None = None,
    messages_column: str | None = None,
    system: str | None = None,
    option_columns: Sequence[str] = (),
    columns: Sequence[str] | None = None,
    output_prefix: str = "",
    timings: bool = False,
    id_column: str | None = None,
) -> BatchPlan:
    """Check a batch in the order of cost: the destination, the input and its columns, then the model.

    The model is prepared if it has to be: downloaded, exported.

    Raises:
        BatchError: If the parts do not go together.
        TableError: If the input cannot be read.
        ModelSourceError: If there is no model.
    """
    output = plan_output(source, destination, output_prefix, timings)
    job = plan_job(source, source_format, prompt, messages_column, system, option_columns, options, source_options)
    if id_column:
        check_ids(job.table, id_column)
    fields = get_fields([model.options.model_dump(mode="json"), job.options])
    output = choose_columns(job.table, output, columns, fields)
    with library_logs():
        identity = identify_model(model)
    job = replace(
        job,
        model=identity,
        versions=get_versions(name_backend(model)),
        greedy=is_greedy(model, options, job.option_columns),
        served_names=name_model(model),
    )
    return BatchPlan(job, output, (place_key(source), *model_keys(model, job.model.get("export"))))


def infer_shard(model: LocalModel | InferenceEndpoint, journal: str, shard: Shard) -> ShardResult:
    """Generate the rows of a shard with the engine of this process.

    Args:
        model: Model or endpoint to use.
        journal: Path or URL of the journal.
        shard: Rows to generate; those that are in the journal are left out.
    """
    from prefect_huggingface.tasks.engines.registry import load_engine
    from prefect_huggingface.tasks.storage.places import Place

    with library_logs():
        return process_shard(load_engine(model), Journal(Place.of(journal)), shard)


def publish_rows(plan: BatchPlan, owner: JournalOwner, replace: bool = False) -> Publication:
    """Write the output of a finished batch and publish it."""
    publication = publish_output(plan.job, owner, plan.output, replace)
    facts = {"rows": publication.rows, "failed": publication.failed, "generated_tokens": publication.generated_tokens}
    for place in filter(None, (plan.output.destination, publication.errors_destination)):
        note_asset(place_key(place), plan.upstream, facts)
    return publication


_settings: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}

plan_batch = task(name="plan-batch", **_settings, **HUB_RETRIES)(check_batch)
run_shard = task(name="run-shard", tags=[ENGINE_TAG], task_run_name="rows-{shard.start}-{shard.stop}", **_settings)(
    infer_shard
)
publish_batch = task(name="publish-batch", **_settings)(publish_rows)
get_batch_status = task(name="get-batch-status", **_settings)(get_status)
