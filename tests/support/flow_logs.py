"""The log and the artifacts of a flow run as the Prefect server has them."""

from __future__ import annotations

import time
import uuid

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, LogFilter
from prefect.client.schemas.objects import Artifact


def messages_of(flow_run_id: uuid.UUID) -> list[str]:
    """Return the log of a run, once it has arrived to its end."""
    wanted = LogFilter.model_validate({"flow_run_id": {"any_": [flow_run_id]}})
    for _ in range(100):
        with get_client(sync_client=True) as client:
            lines = client.read_logs(wanted, limit=200)
        if any(line.name == "prefect.flow_runs" and line.message.startswith("Finished in state") for line in lines):
            break
        time.sleep(0.2)
    return [line.message for line in sorted(lines, key=lambda line: line.timestamp)]


def read_artifacts(flow_run_id: uuid.UUID) -> dict[str | None, Artifact]:
    """Return the artifacts of a run by their keys."""
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        return {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=wanted)}
