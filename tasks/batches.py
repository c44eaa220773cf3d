"""Tasks of a batch: plan it, resolve its models, run its shards, publish its output, and look at its journal."""

from __future__ import annotations

import queue
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from prefect import task
from prefect.blocks.core import Block
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture

from prefect_huggingface.blocks import GenerationOptions, HuggingFaceCredentials, InferenceEndpoint, LocalModel
from prefect_huggingface.tasks.artifacts import ProgressReport
from prefect_huggingface.tasks.assets import model_keys, note_asset, place_key
from prefect_huggingface.tasks.batching.job import (
    BatchJob,
    BatchOptions,
    Commits,
    InputType,
    Model,
    Output,
    ResolvedModel,
    check_ids,
    describe_models,
    list_models,
    plan_job,
    resolve_model,
)
from prefect_huggingface.tasks.batching.output import (
    Publication,
    check_apart,
    choose_columns,
    place_beside,
    plan_output,
    publish_output,
)
from prefect_huggingface.tasks.batching.run import (
    BatchMonitor,
    BatchRun,
    CancelWatch,
    Progress,
    check_failures,
    choose_rows,
    get_status,
)
from prefect_huggingface.tasks.batching.shard import Shard, ShardResult, process_shard
from prefect_huggingface.tasks.downloads import HUB_RETRIES
from prefect_huggingface.tasks.errors import BatchError, TableError
from prefect_huggingface.tasks.progress import ProgressBar, describe
from prefect_huggingface.tasks.run_logs import library_logs, run_log
from prefect_huggingface.tasks.storage.journals.ownership import JournalOwner
from prefect_huggingface.tasks.storage.places import Place, reach_hub
from prefect_huggingface.tasks.storage.tables.inputs import Rows
from prefect_huggingface.tasks.waiting import WaitNotice

ENGINE_TAG = "hugging-face-engine"
"""Tag of the tasks that load a model. A concurrency limit on it keeps a machine from loading two by accident."""
START_SECONDS = 5.0  # a shard that has not begun by then waits for something


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What a batch will do, all checked. `chosen` are the rows of a trial, None for all."""

    job: BatchJob
    output: Output
    chosen: Rows | None = None


def check_batch(
    model: Model,
    source: str,
    destination: str,
    prompt: str | None,
    options: GenerationOptions | None = None,
    system: str | None = None,
    rows: int | None = None,
    more: BatchOptions | None = None,
    input_type: InputType | None = None,
    pair: str | None = None,
) -> BatchPlan:
    """Check a batch in the order of cost: the destination, then the input and its columns. Nothing is changed.

    Raises:
        BatchError: If the parts do not go together.
        ChainError: If the steps of a chain do not.
        TableError: If the input cannot be read.
    """
    more = more or BatchOptions()
    output = plan_output(source, destination)
    job = plan_job(source, prompt, system, options, more, input_type, pair)
    if more.id_column:
        check_ids(job.table, more.id_column)
    models = list_models(model, more.steps or ())
    job = describe_models(job, models, more.served_names)
    output = choose_columns(job, output, more)
    chosen = choose_rows(job.table.rows, rows, more)
    if chosen is not None:  # a trial has a file of its own, which every trial replaces
        output = replace(output, destination=place_beside(output.destination, "trial"))
        check_apart(source, Place(output.destination))
    if job.table.format == "openai":
        check_apart(source, Place(place_beside(output.destination, "errors")))
    return BatchPlan(job, output, chosen)


def prepare_models(models: Sequence[Model], commits: Sequence[Commits]) -> list[ResolvedModel]:
    """Resolve each model to one content for the whole job: its commit is found, it is downloaded and exported.

    `commits` are those of each model that an earlier run of the job has found, or none.

    Raises:
        HuggingFaceTaskError: If there is no model, it cannot be had, or its export failed.
    """
    with library_logs():
        return [resolve_model(model, found) for model, found in zip(models, commits, strict=True)]


@dataclass(frozen=True, slots=True)
class ShardModel:
    """A model on its way to the process of a shard, without its secrets.

    In the process that lends it, it is the model itself. Another process reads the secrets from the saved blocks that
    hold them.

    Attributes:
        bare: The model without its secrets.
        secrets: For each field that holds a secret, the reference to a saved block with it, None where there is none.
        key: What the process that lends it knows it by.
    """

    bare: Model
    secrets: Mapping[str, Mapping[str, str] | None]
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def of(cls, model: Model) -> ShardModel:
        """Return a model without its secrets."""
        bare: dict[str, Any] = {}
        secrets = {}
        if model.credentials is not None and model.credentials.token is not None:
            bare["credentials"] = model.credentials.model_copy(update={"token": None})
            secrets["credentials"] = _reference(model.credentials)
        if isinstance(model, InferenceEndpoint) and model.headers is not None:
            bare["headers"], secrets["headers"] = None, _reference(model)
        return cls(model.model_copy(update=bare), secrets)

    def borrow(self) -> Model:
        """Return the model.

        Raises:
            BatchError: If this is another process, and a secret that the model needs is in no saved block.
        """
        if self.key in _lent:
            return _lent[self.key]
        model: Any = self.bare
        for name, reference in self.secrets.items():
            if reference is not None:
                block: Any = Block.load_from_ref(dict(reference), _sync=True)  # type: ignore[call-arg]
                model = model.model_copy(update={name: block.headers if name == "headers" else block})
            elif isinstance(model, InferenceEndpoint):  # a local model is here already, and needs no token any more
                raise BatchError(
                    f"The {name} of the endpoint {model.base_url!r} are not saved, and no token travels to another "
                    "process. Save the block, `.save('name')`, and use the saved one."
                )
        return model  # type: ignore[no-any-return]


def _reference(block: Any) -> Mapping[str, str] | None:
    try:
        reference: Mapping[str, str] = block.ref()["$ref"]
    except ValueError:
        return None
    return reference


_lent: dict[str, Model] = {}


@contextmanager
def lent_models(models: Sequence[Model]) -> Iterator[tuple[ShardModel, ...]]:
    """Yield models without their secrets; in this process they are themselves for the time of the block.

    Meanwhile the parameters of the flow run, which Prefect would send along, are out of reach.
    """
    lent = tuple(map(ShardModel.of, models))
    _lent.update(zip((each.key for each in lent), models, strict=True))
    context = FlowRunContext.get()
    try:
        with context.model_copy(update={"parameters": {}}) if context else nullcontext():
            yield lent
    finally:
        for each in lent:
            _lent.pop(each.key, None)


@contextmanager
def hub_of(model: Model) -> Iterator[None]:
    """Use the credentials of a model for inputs and outputs on the Hub, `hf://datasets/...` for instance."""
    # What a server of one's own takes for a token is not for the Hub.
    own = None if isinstance(model, InferenceEndpoint) and model.url is not None else model.credentials
    credentials = own or HuggingFaceCredentials()
    with reach_hub(credentials.endpoint, credentials.get_token()):
        yield


def infer_shard(models: Sequence[ShardModel], shard: Shard) -> ShardResult:
    """Generate the rows of a shard that are not in the journal yet, with the engines of this process.

    Raises:
        BatchError: If a model in a folder has changed since the batch began.
    """
    from prefect_huggingface.tasks.engines.registry import load_engine

    here, journal = [model.borrow() for model in models], shard.owner.journal
    with library_logs(), hub_of(here[0]):
        engines = [load_engine(model) for model in here]
        record = journal.read_job()
        if record is None:
            raise BatchError(
                f"There is no journal in {journal.place.url!r} on this machine. Let the workers share that folder, "
                "that of `PREFECT_HUGGINGFACE_HOME` for an output on the Hub."
            )
        identities = record.get("models", ())
        for model, identity in zip(here, identities, strict=True):
            # What is pinned to a commit cannot change.
            parts: list[Any] = [model, *model.adapters] if isinstance(model, LocalModel) else []
            if any(part.is_local for part in parts) and resolve_model(model).identity != identity:
                raise BatchError(f"{model.model_id!r} has changed since the batch began. Put it back, or start anew.")
        return process_shard(engines, shard)


def publish_rows(
    plan: BatchPlan,
    owner: JournalOwner,
    replaceable: bool = False,
    progress: Progress | None = None,
    upstream: Sequence[str] = (),
) -> Publication:
    """Write the output of a finished batch and publish it."""
    replaceable = replaceable or plan.chosen is not None
    publication = publish_output(plan.job, owner, plan.output, replaceable, progress, plan.chosen)
    summary = publication.summary
    facts = {"rows": summary.rows, "failed": summary.failed, "generated_tokens": publication.generated_tokens}
    for place in filter(None, (summary.destination, summary.errors_destination)):
        note_asset(place_key(place), upstream, facts)
    return publication


def list_upstream(plan: BatchPlan, models: Sequence[Model]) -> tuple[str, ...]:
    """Return the keys of the assets that a batch reads: its input, its models and their exports."""
    pairs = zip(models, plan.job.models, strict=True)
    keys = (key for model, identity in pairs for key in model_keys(model, identity.get("export")))
    return (place_key(plan.job.table.source), *keys)


_settings: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}

plan_batch = task(name="plan-batch", **_settings)(check_batch)
resolve_models = task(name="resolve-models", **_settings, **HUB_RETRIES)(prepare_models)
run_shard = task(name="run-shard", tags=[ENGINE_TAG], task_run_name="rows-{shard.start}-{shard.stop}", **_settings)(
    infer_shard
)
publish_batch = task(name="publish-batch", **_settings)(publish_rows)
get_batch_status = task(name="get-batch-status", **_settings)(get_status)


def run_shards(
    models: Sequence[ShardModel], run: BatchRun, monitor: BatchMonitor, watch: CancelWatch, more: BatchOptions
) -> Progress:
    """Hand the shards to the workers, watch them, and return what they came to.

    Whatever happens, they end and commit what is finished.

    Raises:
        BatchError: If too many rows failed, or the run was stopped or succeeded by another.
        BatchCancelledError: If the flow run was cancelled.
    """
    journal, report = run.owner.journal, ProgressReport("batch-progress", f"{run.rows:,} rows")
    what = f"No shard has begun: waiting for a free worker, or for the concurrency limit on the tag {ENGINE_TAG!r}"
    waits: WaitNotice | None = WaitNotice(run_log(), what, START_SECONDS)
    finished: queue.SimpleQueue[PrefectFuture[Any]] = queue.SimpleQueue()
    futures = [run_shard.submit(models, shard) for shard in run.shards]
    for future in futures:
        future.add_done_callback(finished.put)
    running = len(futures)
    begins: list[float] = []
    ends: list[float] = []
    is_complete = True
    with ProgressBar("rows", run.rows, more.show_progress) as bar:

        def tell(final: bool = False) -> Progress:
            progress = monitor.measure()
            bar.update(progress)
            report.update(progress.share, describe(progress), final=final)
            return progress

        try:
            while len(ends) < len(futures):
                try:
                    future = finished.get(timeout=journal.poll_seconds)
                    running -= 1
                    result = future.result()
                    ends.append(time.monotonic())  # the clocks of other machines may differ
                    begins.append(ends[-1] - result.seconds)
                    is_complete = is_complete and result.complete
                except queue.Empty:
                    waits = waits if waits and _is_waiting(futures[0], waits) else None
                watch.check()
                check_failures(tell(), more.max_failures, more.min_valid)
        except BaseException as exc:
            with suppress(TableError, OSError):  # a shard that cannot reach the journal for so long ends as well
                run.owner.request_stop(type(exc).__name__, lambda: finished.qsize() >= running)
            for future in futures:  # they commit what is finished
                future.wait()
            raise
        finally:
            tell(final=True)
    if not is_complete:
        raise BatchError(f"The batch was stopped, or taken over by another run. {journal.place.url!r} keeps its rows.")
    return replace(monitor.measure(), seconds=max(ends, default=0.0) - min(begins, default=0.0))


def _is_waiting(first: PrefectFuture[Any], notice: WaitNotice) -> bool:
    """Return whether the first shard has not begun, and say so in the log."""
    with suppress(Exception):  # a server that is busy answers the next time
        state = first.state  # each look at it is a request to the server
        if not state.is_pending() and not state.is_scheduled():
            return False
        notice.tell()
    return True
