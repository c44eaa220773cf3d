"""Creating automations from files: those that are not there, and those that have changed since.

The files have the form of `prefect automation create --from-file`. In them, a deployment is named
(`deployment: flow/deployment`) where Prefect wants its id, and so is a notification block (`block: type/name`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.schemas.automations import Automation, AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from pydantic import ValidationError

from prefect_huggingface.tasks.errors import PlanError

FOLDER = Path(__file__).parent
NOTIFY = "notify"


class _NotThereError(Exception):
    """The server does not have what a file names."""


class _NotNamedError(Exception):
    """A file leaves a name to the caller, who gives none."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one file.

    Attributes:
        name: Name of the automation.
        result: "missing" if something that it needs is not there.
        reason: Why it was left out, or what is missing.
    """

    name: str
    result: Literal["created", "updated", "unchanged", "left out", "missing"]
    reason: str = ""


def create_automations(folder: Path = FOLDER, notify: str | None = None, only: tuple[str, ...] = ()) -> list[Outcome]:
    """Create or update the automations of a folder.

    An automation is known by its name. Whether it is enabled is left as it is on the server.

    Args:
        folder: Folder with YAML files.
        notify: Notification block, as "type/name", for the files that send messages. They are left out without it.
        only: Names of files, without their ending. All when empty.

    Raises:
        PlanError: If there is no server, or a file is no automation.
    """
    if not PREFECT_API_URL.value():
        raise PlanError("`PREFECT_API_URL` is not set, so there is no server. Set it, or start `prefect server start`.")
    files = [path for path in sorted(folder.glob("*.yaml")) if not only or path.stem in only]
    if not files:
        raise PlanError(f"{str(folder)!r} has no automation{f' of {only!r}' if only else ''}. Name another folder.")
    with get_client(sync_client=True) as client:
        return [_create(client, path, notify) for path in files]


def _create(client: SyncPrefectClient, path: Path, notify: str | None) -> Outcome:
    record = read_file(path)
    name = str(record["name"])
    try:
        actions = [_resolve(client, action, notify) for action in record["actions"]]
    except _NotNamedError as exc:
        return Outcome(name, "left out", str(exc))
    except _NotThereError as exc:
        return Outcome(name, "missing", str(exc))
    try:
        wanted = AutomationCore.model_validate({**record, "actions": actions})
    except ValidationError as exc:
        raise PlanError(f"{str(path)!r} is no automation: {exc}. Correct the file.") from None
    return _save(client, wanted)


def read_file(path: Path) -> dict[str, Any]:
    """Return the content of a file.

    Raises:
        PlanError: If it is no mapping with a name, a trigger and actions.
    """
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as exc:
        raise PlanError(f"{str(path)!r} cannot be read: {exc}. Correct the file.") from None
    if not isinstance(record, dict) or not {"name", "trigger", "actions"} <= set(record):
        raise PlanError(f"{str(path)!r} is no automation. It must have `name`, `trigger` and `actions`.")
    return record


def _resolve(client: SyncPrefectClient, action: Mapping[str, Any], notify: str | None) -> dict[str, Any]:
    """Return an action with ids in place of names.

    Raises:
        _NotThereError: If the server does not have what is named.
        _NotNamedError: If it is left to the caller, who names nothing.
    """
    found = dict(action)
    if name := found.pop("deployment", None):
        found["deployment_id"] = _find_deployment(client, name)
    if name := found.pop("block", None):
        name = notify if name == NOTIFY else name
        if not name:
            raise _NotNamedError("no notification block is named (--notify type/name)")
        found["block_document_id"] = _find_block(client, name)
    return found


def _find_deployment(client: SyncPrefectClient, name: str) -> str:
    try:
        return str(client.read_deployment_by_name(name).id)
    except ObjectNotFound:
        raise _NotThereError(f"there is no deployment {name!r}; deploy it first") from None


def _find_block(client: SyncPrefectClient, name: str) -> str:
    kind, _, block = name.partition("/")
    try:
        return str(client.read_block_document_by_name(block, kind).id)
    except ObjectNotFound:
        raise _NotThereError(f"there is no block {name!r}; save it first") from None


def _save(client: SyncPrefectClient, wanted: AutomationCore) -> Outcome:
    there = client.read_automations_by_name(wanted.name)
    if not there:
        client.create_automation(wanted)
        return Outcome(wanted.name, "created")
    wanted = wanted.model_copy(update={"enabled": there[0].enabled})
    if _is_same(there[0], wanted):
        return Outcome(wanted.name, "unchanged")
    client.update_automation(there[0].id, wanted)
    return Outcome(wanted.name, "updated")


def _is_same(there: Automation, wanted: AutomationCore) -> bool:
    # Not as JSON, where the events of a trigger come in any order.
    fields = set(AutomationCore.model_fields)
    return bool(there.model_dump(include=fields) == wanted.model_dump(include=fields))
