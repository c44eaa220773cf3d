"""The flows that look after the store of models and report failed runs."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId, LogFilterLevel
from prefect.client.schemas.objects import FlowRun, Log
from prefect.client.schemas.sorting import LogSort
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_UI_URL
from pydantic import Field

from prefect_huggingface.blocks import ModelStore
from prefect_huggingface.flows.forms import form_flow, titled
from prefect_huggingface.tasks.artifacts import escape_markdown, markdown_table, publish_markdown, publish_table
from prefect_huggingface.tasks.exports import prune_store
from prefect_huggingface.tasks.storage.eviction import PruneReport

LOG_LINES = 20
WARNING = 30


@form_flow(name="prune-models")
def prune_models(
    store: Annotated[ModelStore | None, titled("Store")] = None,
    max_size_gb: Annotated[Annotated[float, Field(ge=0)] | None, titled("Size to come down to (GB)")] = None,
    default_size_gb: Annotated[Annotated[float, Field(ge=0)] | None, titled("Size without a limit (GB)")] = None,
) -> PruneReport:
    """Remove the least recently used models until the store is within its size. What is in use stays.

    What is removed is downloaded or exported again when it is next needed.

    Args:
        store: Folder with the models. The folder in the user's cache when left empty.
        max_size_gb: Size in units of 10^9 bytes. The limit of the store when left empty; 0 removes all that is idle.
        default_size_gb: Size for a store without a limit of its own.

    Returns:
        What was removed, what stayed because it is in use, and the sizes.

    Raises:
        PlanError: If there is neither a size nor a limit of the store.
    """
    report = prune_store(store, max_size_gb, default_size_gb)
    get_run_logger().info(
        "Removed %d models, %.2f GB. %.2f GB are left.",
        len(report.removed), report.freed_bytes / 1e9, report.kept_bytes / 1e9,
    )  # fmt: skip
    rows = [
        {"kind": each.kind, "model": each.source or each.name, "commit": each.commit, "MB": each.size_bytes // 10**6}
        for each in report.removed
    ]
    publish_table("pruned-models", rows, "What was removed from the store, the least recently used first.")
    return report


@form_flow(name="report-failure")
def report_failure(flow_run_id: Annotated[UUID, titled("Flow run")]) -> None:
    """Leave a report of a failed run among the artifacts, under the key `failed-runs`.

    Args:
        flow_run_id: Run that failed.
    """
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(flow_run_id)
        name = client.read_flow(run.flow_id).name
        chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]), level=LogFilterLevel(ge_=WARNING))
        logs = client.read_logs(chosen, limit=LOG_LINES, sort=LogSort.TIMESTAMP_DESC)
    publish_markdown("failed-runs", describe_failure(name, run, logs[::-1]), f"{name}: {run.name}")


def describe_failure(flow_name: str, run: FlowRun, logs: list[Log]) -> str:
    """Return what is known of a failed run as Markdown, with its last warnings and errors, which come in order."""
    state = run.state
    lines = [
        ("Run", run.name),
        ("State", state.name if state else "unknown"),
        ("Started", run.start_time or "never"),
        ("Scheduled for", run.expected_start_time),
        ("Attempts", run.run_count),
        ("Reason", (state.message if state else None) or "not given"),
    ]
    parts = [f"# {escape_markdown(flow_name)}: {escape_markdown(run.name)}", markdown_table(("", ""), lines)]
    if address := PREFECT_UI_URL.value():
        parts.append(f"[Open the run]({address.rstrip('/')}/runs/flow-run/{run.id}). Retry it there to go on.")
    if logs:
        rows = [(f"{log.timestamp:%H:%M:%S}", log.message) for log in logs]
        parts += ["## Last warnings and errors", markdown_table(("time", "message"), rows)]
    return "\n\n".join(parts)
