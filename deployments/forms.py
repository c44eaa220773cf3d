"""Finish the forms of the deployments on the Prefect server of `PREFECT_API_URL`, after `prefect deploy`.

    python -m prefect_huggingface.deployments.forms

`prefect deploy` stores the names of blocks as they stand in `prefect.yaml`. A run finds them by these, but the form
shows none as chosen. And it stores a form that lets unknown parameters pass. Here the form gets its blocks, and the
server refuses what no flow knows, before a run is made. Deployments of other packages are left alone.
"""

from __future__ import annotations

import sys
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound

PAGE = 200  # of deployments, as many as a server gives at once
PACKAGE = "prefect_huggingface."


def finish_forms() -> list[str]:
    """Finish the forms of this package's deployments.

    Returns:
        Names of the blocks that a deployment refers to and that are not there.
    """
    missing: list[str] = []
    with get_client(sync_client=True) as client:
        deployments: list[DeploymentResponse] = []
        while page := client.read_deployments(limit=PAGE, offset=len(deployments)):
            deployments += page
        for deployment in deployments:
            if (deployment.entrypoint or "").startswith(PACKAGE):
                _finish(client, deployment, missing)
    return sorted(set(missing))


def _finish(client: SyncPrefectClient, deployment: DeploymentResponse, missing: list[str]) -> None:
    schema = {**(deployment.parameter_openapi_schema or {}), "additionalProperties": False}
    parameters = _choose_blocks(client, deployment.parameters, missing)
    client.update_deployment(deployment.id, DeploymentUpdate(parameters=parameters, parameter_openapi_schema=schema))


def _choose_blocks(client: SyncPrefectClient, value: Any, missing: list[str]) -> Any:
    """Return parameters with the ids of blocks in place of their names."""
    if isinstance(value, list):
        return [_choose_blocks(client, item, missing) for item in value]
    if not isinstance(value, dict):
        return value
    reference = value.get("$ref")
    if not isinstance(reference, dict) or "block_document_slug" not in reference:
        return {key: _choose_blocks(client, item, missing) for key, item in value.items()}
    kind, _, name = reference["block_document_slug"].partition("/")
    try:
        document = client.read_block_document_by_name(name, kind)
    except ObjectNotFound:
        missing.append(f"{kind}/{name}")
        return value
    return {"$ref": {"block_document_id": str(document.id)}}


def main() -> None:
    """Finish the forms, and say which blocks are missing."""
    missing = finish_forms()
    if missing:
        sys.exit(f"These blocks are not there: {', '.join(missing)}. Save them with `make blocks`, and deploy again.")


if __name__ == "__main__":
    main()
