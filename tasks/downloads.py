"""Tasks that bring a model from the Hub onto this machine, and that tell beforehand what this would take."""

from __future__ import annotations

import time
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_logger

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.errors import PlanError
from prefect_huggingface.tasks.hub_errors import HubError
from prefect_huggingface.tasks.records import Snapshot
from prefect_huggingface.tasks.run_logs import library_logs
from prefect_huggingface.tasks.storage.hub.download import DownloadPlan, plan_snapshot
from prefect_huggingface.tasks.storage.snapshots import get_snapshot

RETRY_DELAYS_SECONDS = (10.0, 60.0, 300.0)
LONGEST_EXTRA_WAIT_SECONDS = 900.0
logger = get_logger(__name__)


def may_retry(task: Any, task_run: Any, state: Any) -> bool:
    """Tell Prefect whether to retry: only after an error that may pass, and after the wait that the Hub asks for.

    What the Hub asks for beyond the delay of the retry is waited for here. A wait of more than a quarter of an hour is
    not worth a worker; the run fails then, and the error says how long to wait.
    """
    error = state.data
    if not isinstance(error, HubError) or not error.transient:
        return False
    extra = extra_wait(error, task_run.run_count, RETRY_DELAYS_SECONDS if task is None else task.retry_delay_seconds)
    if extra > LONGEST_EXTRA_WAIT_SECONDS:
        return False
    if extra > 0:
        logger.info("The Hub asks to wait %.0f seconds more before the next attempt.", extra)
        time.sleep(extra)
    return True


def extra_wait(error: HubError, run_count: int, delays: Any) -> float:
    """Return the seconds that the Hub asks to wait beyond the delay of the coming retry."""
    if not isinstance(delays, (list, tuple)):
        delays = [delays or 0.0]
    delay = delays[min(max(run_count - 1, 0), len(delays) - 1)]
    return max(0.0, (error.wait_seconds or 0.0) - float(delay))


def fetch_model(model: LocalModel) -> Snapshot:
    """Return the complete and verified snapshot of a model; download what is missing.

    Every file is checked against its sha256 or git sha1 before it appears. What was cut off is continued where it
    stopped. A model that is pinned to a full commit and is here needs no network.

    Args:
        model: Model with a Hub id, its revision, credentials and store, or with a folder.

    Returns:
        Repository, commit, folder, and the files with sizes and hashes.

    Raises:
        HubError: If it cannot be had; the kinds are in `hub_errors`.
        ModelSourceError: If the model is a folder that is missing or holds no model.
    """
    with library_logs():
        return get_snapshot(model)


def plan_fetch(model: LocalModel) -> DownloadPlan:
    """Return what a download would take: files, sizes, what is here already, free disk, access and licence.

    Nothing is downloaded and nothing is written.

    Args:
        model: Model with a Hub id.

    Returns:
        The plan. Its `problem` says why the download cannot work, if it cannot.

    Raises:
        PlanError: If the model is a folder, so that there is nothing to download.
        HubError: If the Hub cannot tell, or the repository holds nothing that the model could use.
    """
    if model.is_local:
        raise PlanError(
            f"{model.model_id!r} is on this machine. There is nothing to download; use the id of a repository."
        )
    return plan_snapshot(model)


HUB_RETRIES: dict[str, Any] = {
    "retries": len(RETRY_DELAYS_SECONDS),
    "retry_delay_seconds": list(RETRY_DELAYS_SECONDS),
    "retry_condition_fn": may_retry,
}
"""Settings of a task that asks the Hub: it is tried again after an error of the network, and after no other."""

_SETTINGS: dict[str, Any] = {"cache_policy": NO_CACHE, **HUB_RETRIES}
download_model = task(name="download-model", **_SETTINGS)(fetch_model)
plan_download = task(name="plan-download", **_SETTINGS)(plan_fetch)
