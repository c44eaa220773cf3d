"""The flow that keeps the store of models within its size."""

from __future__ import annotations

from typing import Annotated

from prefect.logging import get_run_logger
from pydantic import Field

from prefect_huggingface.blocks import ModelStore
from prefect_huggingface.flows.forms import form_flow, titled
from prefect_huggingface.tasks.artifacts import publish_table
from prefect_huggingface.tasks.exports import prune_store
from prefect_huggingface.tasks.storage.eviction import PruneReport


@form_flow(name="prune-models")
def prune_models(
    store: Annotated[ModelStore | None, titled("Store")] = None,
    max_size_gb: Annotated[Annotated[float, Field(ge=0)] | None, titled("Size to come down to (GB)")] = None,
) -> PruneReport:
    """Remove the least recently used models until the store is within its size. What is in use stays.

    What is removed is downloaded or exported again when it is next needed.

    Args:
        store: Folder with the models. The folder in the user's cache when left empty.
        max_size_gb: Size in units of 10^9 bytes. The limit of the store when left empty; 0 removes all that is idle.

    Returns:
        What was removed, what stayed because it is in use, and the sizes.

    Raises:
        PlanError: If neither a size nor a limit of the store is given.
    """
    report = prune_store(store, max_size_gb)
    get_run_logger().info(
        "Removed %d models, %.2f GB. %.2f GB are left.",
        len(report.removed), report.freed_bytes / 1e9, report.kept_bytes / 1e9,
    )  # fmt: skip
    rows = [
        {
            "kind": model.kind,
            "model": model.source or model.name,
            "commit": model.commit,
            "MB": model.size_bytes // 10**6,
        }
        for model in report.removed
    ]
    publish_table("pruned-models", rows, "What was removed from the store, the least recently used first.")
    return report
