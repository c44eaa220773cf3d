"""What a person does in the Prefect UI, in a real browser: save blocks, run a batch, read its results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from support.browser import BROWSER, DRIVER, Browser, open_browser
from support.prefect_services import PrefectServices, stop_process

pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no Chromium: install the Debian packages chromium and chromium-driver"
)

TOKEN = "hf_onlyForThisTest0123456789"


@pytest.fixture(scope="module")
def browser(deployed: PrefectServices) -> Iterator[Browser]:
    with open_browser(deployed.url.removesuffix("/api")) as window:
        yield window


@pytest.fixture(scope="module")
def worker(deployed: PrefectServices) -> Iterator[None]:
    process = deployed.start("browser-worker", "worker", "start", "--pool", "hugging-face")
    yield
    stop_process(process)


def open_form(browser: Browser, deployment: dict[str, Any]) -> None:
    browser.open(f"/v2/deployments/deployment/{deployment['id']}/run", "Submit")
    browser.find_field("Number of shards")


def find_runs(server: PrefectServices, deployment: dict[str, Any]) -> list[dict[str, Any]]:
    wanted = {"id": {"any_": [deployment["id"]]}}
    runs = server.post("flow_runs/filter", deployments=wanted, sort="EXPECTED_START_TIME_DESC")
    return [run for run in runs if not run["auto_scheduled"]]


def submit_form(browser: Browser, server: PrefectServices, deployment: dict[str, Any]) -> dict[str, Any]:
    """Press the button and return the run. A busy SQLite server may refuse it; then a person presses again."""
    before = len(find_runs(server, deployment))
    for _ in range(4):
        browser.click("Submit")
        with suppress(TimeoutError):
            browser.wait(lambda: len(find_runs(server, deployment)) > before, "the run", 15)
            return find_runs(server, deployment)[0]
    raise TimeoutError(f"The form makes no run. The page {browser.place}:\n{browser.text[-3000:]}")


def test_a_saved_token_is_masked(browser, deployed):
    browser.open("/v2/blocks/catalog/hugging-face-credentials/create", "Attempts")
    browser.click("password", below="Token")
    assert browser.find_field("Token").get_attribute("type") == "password"
    browser.fill_all({"Name": "my-hub", "Token": TOKEN})
    browser.click("Save")
    browser.wait(lambda: "********" in browser.text, "the saved block")
    browser.keep_screenshot("credentials")
    for path in (browser.place, browser.place + "/edit"):
        browser.open(path, "my-hub")
        assert TOKEN not in browser.driver.page_source
    saved = deployed.request(
        "GET", "block_types/slug/hugging-face-credentials/block_documents/name/my-hub?include_secrets=true"
    ).json()
    assert saved["data"]["token"] == TOKEN


def test_a_model_is_saved_from_its_form(browser, deployed, bundled_model):
    browser.open("/v2/blocks/catalog/hugging-face-local-model/create", "Trust remote code")
    browser.fill_all({"Name": "small-model", "Model": str(bundled_model)})
    browser.click("Save")
    browser.wait(lambda: "/blocks/block/" in browser.place, "the saved block")
    saved = deployed.request("GET", "block_types/slug/hugging-face-local-model/block_documents/name/small-model").json()
    assert saved["data"]["model_id"] == str(bundled_model)


def test_a_wrong_value_is_refused_by_the_form(browser, deployed, deployments):
    deployment = deployments["batch-inference"]
    before = len(find_runs(deployed, deployment))
    open_form(browser, deployment)
    browser.fill("Number of shards", "0")
    browser.click("Submit")
    message = browser.find_field("Number of shards").get_attribute("validationMessage")
    assert message == "Value must be greater than or equal to 1."
    browser.keep_screenshot("refused")
    assert browser.place.endswith("/run")
    assert len(find_runs(deployed, deployment)) == before


@pytest.mark.timeout(280)
def test_a_batch_is_started_from_its_form_and_watched(browser, deployed, deployments, worker, tmp_path):
    rows = tmp_path / "countries.jsonl"
    rows.write_text("".join(json.dumps({"country": name}) + "\n" for name in ("France", "Spain", "Peru")))
    deployment = deployments["batch-inference"]
    open_form(browser, deployment)
    browser.fill_all(
        {
            "Input file": str(rows),
            "Output file": str(tmp_path / "capitals-{date}.jsonl"),
            "Prompt template": "What is the capital of {country}?",
        }
    )
    browser.driver.execute_script("arguments[0].scrollIntoView()", browser.find_field("Run Name"))
    browser.keep_screenshot("batch-form")
    run = submit_form(browser, deployed, deployment)
    assert run["parameters"]["source"] == str(rows)
    browser.open(f"/v2/runs/flow-run/{run['id']}", run["name"])
    # The page also shows the states of the tasks.
    browser.wait(lambda: deployed.read_run(run["id"])["state"]["type"] == "COMPLETED", "the end of the run", 240)
    browser.open(f"/v2/runs/flow-run/{run['id']}", run["name"])
    browser.click("Artifacts")
    browser.wait(lambda: "batch-summary" in browser.text and "batch-samples" in browser.text, "the artifacts")
    browser.keep_screenshot("run")

    artifacts = deployed.post("artifacts/filter", artifacts={"flow_run_id": {"any_": [run["id"]]}})
    pages = {each["key"]: f"/v2/artifacts/artifact/{each['id']}" for each in artifacts}
    browser.open(pages["batch-progress"], "Progress: 100%")
    browser.open(pages["batch-samples"], "Madrid")
    browser.keep_screenshot("samples")
    browser.open(pages["batch-summary"], "Succeeded")
    browser.keep_screenshot("summary")
    written = [
        json.loads(line) for path in tmp_path.glob("capitals-2*.jsonl") for line in path.read_text().splitlines()
    ]
    assert [row["completion"].strip() for row in written] == ["Paris", "Madrid", "Lima"]
