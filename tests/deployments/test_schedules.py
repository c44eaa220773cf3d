"""Deployments from `prefect.yaml`, and one that really runs on its schedule."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from support.prefect_services import PrefectServices, stop_process, wait_until

ROOT = Path(__file__).parent.parent.parent
SAVE_BLOCKS = """
from prefect_huggingface.blocks import GenerationOptions, LocalModel, ModelStore
ModelStore(path={store!r}).save("default", overwrite=True)
LocalModel(
    model_id={model!r}, store=ModelStore.load("default"), options=GenerationOptions(max_new_tokens=16)
).save("default", overwrite=True)
"""


@pytest.fixture(scope="module")
def deployed(services: PrefectServices, bundled_model: Path, tmp_path_factory) -> PrefectServices:
    """The deployments of the project, with a default model and a work pool."""
    code = SAVE_BLOCKS.format(store=str(tmp_path_factory.mktemp("store")), model=str(bundled_model))
    subprocess.run([sys.executable, "-c", code], env=services.environment, check=True, timeout=120)
    services.run("work-pool", "create", "hugging-face", "--type", "process")
    services.run("deploy", "--prefect-file", "deployments/prefect.yaml", "--all", cwd=ROOT)
    return services


def test_every_deployment_has_a_form_with_sentences(deployed):
    deployments = deployed.post("deployments/filter")
    assert {deployment["name"] for deployment in deployments} >= {"prepare-model", "prompt-chain", "batch-inference"}
    for deployment in deployments:
        assert deployment["description"]
        for name, field in deployment["parameter_openapi_schema"]["properties"].items():
            assert field.get("description"), f"{deployment['name']}: {name}"


def test_a_scheduled_run_writes_its_output(deployed, tmp_path):
    rows = tmp_path / "countries.jsonl"
    rows.write_text("".join(json.dumps({"country": name}) + "\n" for name in ("France", "Spain")))
    output = tmp_path / "capitals.jsonl"
    deployment = next(d for d in deployed.post("deployments/filter") if d["name"] == "batch-inference")
    parameters = {
        **deployment["parameters"], "source": str(rows), "destination": str(output),
        "prompt": "What is the capital of {country}?",
    }  # fmt: skip
    schedule = {"active": True, "schedule": {"interval": 5, "anchor_date": "2026-01-01T00:00:00Z"}}
    url = f"{deployed.url}/deployments/{deployment['id']}"
    httpx.patch(url, json={"parameters": parameters}, timeout=30).raise_for_status()
    httpx.post(f"{url}/schedules", json=[schedule], timeout=30).raise_for_status()

    worker = deployed.start("worker", "worker", "start", "--pool", "hugging-face", "--limit", "1")
    try:
        wait_until(output.exists, 150, "the scheduled run")
    finally:
        stop_process(worker)

    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["completion"].strip() for row in answers] == ["Paris", "Madrid"]
