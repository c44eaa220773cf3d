"""Snapshots from the Hub: verified, resumable, by commit, and offline where they are complete."""

from prefect_huggingface.tasks.storage.hub.fetching import fetch_snapshot
from prefect_huggingface.tasks.storage.hub.inventory import (
    StoredSnapshot,
    list_snapshots,
    remove_partials,
    remove_snapshot,
)
from prefect_huggingface.tasks.storage.hub.plans import DownloadPlan, PlannedFile, plan_snapshot

__all__ = [
    "DownloadPlan",
    "PlannedFile",
    "StoredSnapshot",
    "fetch_snapshot",
    "list_snapshots",
    "plan_snapshot",
    "remove_partials",
    "remove_snapshot",
]
