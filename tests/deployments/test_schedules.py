"""Deployments from `prefect.yaml`, and one that really runs on its schedule."""

from __future__ import annotations

import json

from support.prefect_services import stop_process, wait_until


def test_a_scheduled_run_writes_its_output(deployed, deployments, tmp_path):
    rows = tmp_path / "countries.jsonl"
    rows.write_text("".join(json.dumps({"country": name}) + "\n" for name in ("France", "Spain")))
    output = tmp_path / "capitals.jsonl"
    deployment = deployments["batch-inference"]
    parameters = {
        **deployment["parameters"], "source": str(rows), "destination": str(output),
        "prompt": "What is the capital of {country}?",
    }  # fmt: skip
    schedule = {"active": True, "schedule": {"interval": 5, "anchor_date": "2026-01-01T00:00:00Z"}}
    path = f"deployments/{deployment['id']}"
    deployed.request("PATCH", path, json={"parameters": parameters}).raise_for_status()
    made = deployed.request("POST", f"{path}/schedules", json=[schedule]).raise_for_status().json()

    worker = deployed.start("worker", "worker", "start", "--pool", "hugging-face", "--limit", "1")
    try:
        wait_until(output.exists, 150, "the scheduled run")
        runs = deployed.post("flow_runs/filter", deployments={"id": {"any_": [deployment["id"]]}})
    finally:
        stop_process(worker)
        deployed.request("DELETE", f"{path}/schedules/{made[0]['id']}").raise_for_status()
        deployed.request("PATCH", path, json={"parameters": deployment["parameters"]}).raise_for_status()

    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["completion"].strip() for row in answers] == ["Paris", "Madrid"]
    # Other tests start runs of this deployment by hand.
    ours = [run["auto_scheduled"] for run in runs if run["parameters"].get("source") == str(rows)]
    assert set(ours) == {True}, "the schedule made the runs, nobody else"
