"""Which flow a flow run is, and whether one process that is shared by many runs can run it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.flows import Flow, load_flow_from_entrypoint

from prefect_huggingface.tasks.errors import WorkerError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.responses import DeploymentResponse

    Log = logging.Logger | logging.LoggerAdapter[Any]

_DIRECTORY_STEP = "prefect.deployments.steps.set_working_directory"


def load_run_flow(client: SyncPrefectClient, flow_run: FlowRun, log: Log) -> Flow[..., Any]:
    """Return the flow of a flow run. It is imported once, and the next run of the process finds it there.

    Args:
        client: Where the deployment is asked for.
        flow_run: Run of a deployment whose entrypoint is a module, such as `package.module.flow`.
        log: Receives what differs from a run in a process of its own.

    Raises:
        WorkerError: If the flow cannot be had by importing a module, or its deployment needs a process of its own.
    """
    if flow_run.deployment_id is None:
        raise WorkerError(f"Flow run {flow_run.name!r} has no deployment. Start it from a deployment.")
    deployment = client.read_deployment(flow_run.deployment_id)
    entrypoint = deployment.entrypoint or ""
    if ":" in entrypoint or not entrypoint:
        raise WorkerError(
            f"The entrypoint {entrypoint!r} is a file. A warm worker imports flows from modules that are installed "
            "where it runs: deploy with an entrypoint such as 'package.module.flow', or use a process worker."
        )
    _check_steps(deployment, log)
    _tell_ignored_environment(deployment, flow_run, log)
    try:
        return load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    except (ImportError, AttributeError, ValueError) as exc:
        raise WorkerError(
            f"The flow {entrypoint!r} cannot be imported: {exc}. Install its package where the warm worker runs, "
            "and start the worker again."
        ) from exc


def _check_steps(deployment: DeploymentResponse, log: Log) -> None:
    """Refuse pull steps, but for a change of the folder, which is only told."""
    for step in deployment.pull_steps or []:
        for name, inputs in step.items():
            if name != _DIRECTORY_STEP:
                raise WorkerError(
                    f"The deployment {deployment.name!r} has the pull step {name!r}, and a warm worker runs none. "
                    "Set `pull: null` and install the code where the worker runs, or use a process worker."
                )
            folder = str((inputs or {}).get("directory", ""))
            if folder and not folder.startswith("{{") and Path(folder).resolve() != Path.cwd():
                log.info("The run stays in the folder %s of the warm worker, not in %s.", os.getcwd(), folder)


def _tell_ignored_environment(deployment: DeploymentResponse, flow_run: FlowRun, log: Log) -> None:
    wanted = {
        **((deployment.job_variables or {}).get("env") or {}),
        **((flow_run.job_variables or {}).get("env") or {}),
    }
    ignored = sorted(name for name, value in wanted.items() if value is not None and os.environ.get(name) != str(value))
    if ignored:
        log.info(
            "A run in a warm worker has no environment of its own. Set these for the worker: %s.", ", ".join(ignored)
        )
