"""Models on the Hub whose files are not here: what can be known of them, and checked, before they are downloaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.hub_errors import HubError
from prefect_huggingface.tasks.storage.exports.plans import check_plan, make_plan
from prefect_huggingface.tasks.storage.exports.recipes import Recipe
from prefect_huggingface.tasks.storage.exports.source_weights import estimate_weights
from prefect_huggingface.tasks.storage.folders import is_openvino_folder
from prefect_huggingface.tasks.storage.hub import DownloadPlan, plan_snapshot
from prefect_huggingface.tasks.storage.hub.connections import HubConnection
from prefect_huggingface.tasks.storage.hub.explanations import attempt
from prefect_huggingface.tasks.storage.hub.layout import RepositoryFolder
from prefect_huggingface.tasks.storage.hub.manifests import known_commit

FULL_COMMIT = re.compile(r"[0-9a-f]{40}")
LARGEST_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """What is known of a source before it is downloaded.

    Attributes:
        commit: Commit, or None where it is not known offline.
        download: Plan of the download, where the Hub was asked.
    """

    commit: str | None
    download: DownloadPlan | None = None


def plan_source(model: LocalModel) -> PlannedSource:
    """Return what is known of a model on the Hub; ask the Hub only for the commit of a branch or tag.

    Raises:
        HubError: If the Hub was asked and cannot tell.
    """
    revision = model.revision or "main"
    if FULL_COMMIT.fullmatch(revision):
        return PlannedSource(revision)
    if model.offline:
        return PlannedSource(known_commit(RepositoryFolder.of(model), revision))
    planned = plan_snapshot(model)
    return PlannedSource(planned.commit, planned)


def check_source(model: LocalModel, recipe: Recipe, source: PlannedSource) -> None:
    """Refuse an export that cannot succeed before its source is downloaded.

    Raises:
        PlanError: With all reasons.
        HubError: If the Hub cannot tell.
    """
    if model.offline:
        return
    planned = source.download or plan_snapshot(model)
    names = [file.path for file in planned.files]
    if planned.complete or planned.problem is not None or is_openvino_folder(names):
        return
    weights = estimate_weights(sum(file.size or 0 for file in planned.files))
    check_plan(make_plan(model, recipe, planned.commit, "", read_remote_config(model, planned.commit), weights))


def read_remote_config(model: LocalModel, commit: str) -> Mapping[str, Any]:
    """Return the content of `config.json` of a repository; empty if it cannot be had or understood."""
    with HubConnection(model.get_credentials(), model.model_id) as hub:

        def read() -> bytes:
            location = hub.locate("config.json", commit)
            if location.size > LARGEST_CONFIG_BYTES:
                return b""
            with hub.read(location, 0) as response:
                response.raise_for_status()
                return bytes(response.read())

        text = attempt(read, hub.about(commit, "config.json"))
    try:
        config = {} if isinstance(text, HubError) else json.loads(text)
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}
