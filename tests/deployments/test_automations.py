"""Automations on a real server: created once, and each does what it is for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Failed, Running
from prefect.utilities.callables import parameter_schema

from prefect_huggingface.deployments.automations.__main__ import main
from prefect_huggingface.deployments.automations.creation import FOLDER, create_automations, read_file
from prefect_huggingface.flows.batches import batch_inference
from prefect_huggingface.flows.maintenance import report_failure
from prefect_huggingface.tasks.errors import PlanError
from support.prefect_services import PrefectServices, prefect_services, wait_until

FILES = {"zombie-runs", "failed-runs", "failed-run-messages", "file-arrived"}
SLEEPER = """
import time
from prefect import flow, tags
@flow
def sleeper():
    print("asleep", flush=True)
    time.sleep(600)
with tags("hugging-face"):
    sleeper()
"""


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServices]:
    """A server of its own: its deployments are not those of the project, and its automations start runs."""
    with prefect_services(tmp_path_factory.mktemp("automations")) as running:
        yield running


@pytest.fixture(scope="module")
def client(services: PrefectServices) -> Iterator[SyncPrefectClient]:
    with (
        temporary_settings({PREFECT_API_URL: services.url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
        get_client(sync_client=True) as client,
    ):
        yield client


def deploy(client: SyncPrefectClient, flow: Any, **parameters: Any) -> Any:
    """Register a flow as a deployment of its own name, without a work pool: its runs are only made."""
    schema = parameter_schema(flow.fn).model_dump(exclude_unset=True)
    return client.create_deployment(
        client.create_flow(flow), flow.name, parameters=parameters, parameter_openapi_schema=schema,
        enforce_parameter_schema=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def deployed(client: SyncPrefectClient) -> dict[str, Any]:
    return {
        "batch": deploy(client, batch_inference, prompt="{question}", more={"shards": 2}),
        "report": deploy(client, report_failure),
    }


@pytest.fixture(scope="module")
def created(client: SyncPrefectClient, deployed: dict[str, Any]) -> list[Any]:
    return create_automations()


def runs_of(services: PrefectServices, deployment: Any) -> list[dict[str, Any]]:
    chosen = {"deployment_id": {"any_": [str(deployment)]}}
    return services.post("flow_runs/filter", flow_runs=chosen, sort="EXPECTED_START_TIME_DESC")


def test_files_are_whole() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == FILES
    for name in FILES:
        record = read_file(FOLDER / f"{name}.yaml")
        assert record["description"].endswith(".")


def test_every_automation_is_made_once(client: SyncPrefectClient, created: list[Any]) -> None:
    results = {each.name.removeprefix("Hugging Face: "): each.result for each in created}
    assert results.pop("send a message about failed runs") == "left out"
    assert set(results.values()) == {"created"}

    (zombies,) = client.read_automations_by_name("Hugging Face: mark runs without a heartbeat as crashed")
    client.pause_automation(zombies.id)
    again = create_automations()
    (found,) = client.read_automations_by_name(zombies.name)
    assert {each.result for each in again} == {"unchanged", "left out"}
    assert (found.id, found.enabled) == (zombies.id, False)
    client.resume_automation(zombies.id)


def test_a_changed_file_changes_its_automation(client: SyncPrefectClient, created: list[Any], tmp_path: Path) -> None:
    shutil.copy(FOLDER / "zombie-runs.yaml", tmp_path)
    file = tmp_path / "zombie-runs.yaml"
    before = file.read_text()
    file.write_text(before.replace("within: 90", "within: 600"))
    (outcome,) = create_automations(tmp_path)
    (found,) = client.read_automations_by_name(outcome.name)
    assert outcome.result == "updated"
    assert found.trigger.model_dump()["within"].total_seconds() == 600
    file.write_text(before)
    assert create_automations(tmp_path)[0].result == "updated"


def test_what_is_missing_is_said(client: SyncPrefectClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = read_file(FOLDER / "file-arrived.yaml")
    record["name"], record["actions"][0]["deployment"] = "other", "no-flow/no-deployment"
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(record))
    assert main(["--folder", str(tmp_path)]) == 1
    assert capsys.readouterr().out == (
        "missing: other (there is no deployment 'no-flow/no-deployment'; deploy it first)\n"
    )
    assert main(["--only", "failed-run-messages", "--notify", "slack-webhook/alerts"]) == 1
    assert "there is no block 'slack-webhook/alerts'; save it first" in capsys.readouterr().out
    assert main(["--only", "nothing"]) == 2
    (tmp_path / "other.yaml").write_text("name: [")
    with pytest.raises(PlanError, match="cannot be read"):
        create_automations(tmp_path)


def test_without_a_server_nothing_is_started() -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}), pytest.raises(PlanError, match="`PREFECT_API_URL` is"):
        create_automations()


@pytest.mark.parametrize("path", ["/data/in.jsonl", "/data/rows of {date} 'x'.jsonl"])
def test_a_file_that_arrives_starts_a_batch(
    services: PrefectServices, deployed: dict[str, Any], created: list[Any], path: str
) -> None:
    payload = json.dumps({"source": path})
    before = len(runs_of(services, deployed["batch"]))
    services.run("event", "emit", "file.arrived", "--resource-id", "file://new", "--payload", payload)

    runs = wait_until(lambda: runs_of(services, deployed["batch"])[before:] and runs_of(services, deployed["batch"]),
                      30, "the run")  # fmt: skip
    literal = path.replace("{", "{{").replace("}", "}}")
    assert len(runs) == before + 1
    assert runs[0]["parameters"] == {
        "prompt": "{question}", "more": {"shards": 2}, "source": literal, "destination": f"{literal}.answers.jsonl",
    }  # fmt: skip


def test_a_failed_run_is_reported(
    services: PrefectServices, client: SyncPrefectClient, deployed: dict[str, Any], created: list[Any]
) -> None:
    flow_id = client.create_flow_from_name("some-flow")
    body = {"flow_id": str(flow_id), "name": "some-run", "tags": ["hugging-face"], "state": {"type": "PENDING"}}
    run_id = services.post("flow_runs/", **body)["id"]
    client.set_flow_run_state(run_id, Running())
    client.set_flow_run_state(run_id, Failed(message="Disk <b>full</b> | at\n/data"))

    (made,) = wait_until(lambda: runs_of(services, deployed["report"]), 30, "the run that reports")
    assert made["parameters"] == {"flow_run_id": run_id}
    report_failure(**made["parameters"])
    (artifact,) = services.post("artifacts/filter", artifacts={"key": {"any_": ["failed-runs"]}})
    assert "some-flow: some-run" in artifact["description"]
    assert r"Disk &lt;b&gt;full&lt;/b&gt; \| at /data" in artifact["data"]
    assert len(runs_of(services, deployed["report"])) == 1


def test_runs_of_others_are_left_alone(
    services: PrefectServices, client: SyncPrefectClient, deployed: dict[str, Any], created: list[Any]
) -> None:
    before = len(runs_of(services, deployed["report"]))
    flow_id = client.create_flow_from_name("foreign-flow")
    for tags in ([], ["hugging-face"]):
        run_id = services.post("flow_runs/", flow_id=str(flow_id), tags=tags, state={"type": "PENDING"})["id"]
        client.set_flow_run_state(run_id, Running())
        client.set_flow_run_state(run_id, Failed())
    # Events are handled in order: once the second run is reported, the first one was passed over.
    reports = wait_until(lambda: runs_of(services, deployed["report"])[before:], 30, "the report")
    assert len(runs_of(services, deployed["report"])) == before + len(reports) == before + 1


@pytest.mark.slow
def test_a_killed_run_becomes_crashed(services: PrefectServices, created: list[Any], tmp_path: Path) -> None:
    environment = {**services.environment, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    process = subprocess.Popen([sys.executable, "-c", SLEEPER], env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"asleep\n"
    wait_until(lambda: _read_sleeper(services), 30, "the run")
    time.sleep(35)  # at least one heartbeat
    assert _read_sleeper(services)["state_name"] == "Running"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run = wait_until(lambda: (found := _read_sleeper(services))["state_name"] == "Crashed" and found, 150, "the end", 1)
    assert "No heartbeat for 90 seconds" in run["state"]["message"]


def _read_sleeper(services: PrefectServices) -> Any:
    (run,) = services.post("flow_runs/filter", flows={"name": {"any_": ["sleeper"]}})
    return run
