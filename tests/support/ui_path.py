"""From `make deployments` to the first run that was started in the UI, as a program of its own.

It runs in a network of its own, without any way out. It prints how long it took, as JSON in its last line.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx

from prefect_huggingface.deployments.services import main
from support.browser import Browser, open_browser
from support.ports import free_port


def can_leave() -> bool:
    """Tell whether another machine can be reached."""
    try:
        httpx.get("http://1.1.1.1", timeout=3)
    except httpx.TransportError:
        return False
    return True


def run_path(home: Path) -> dict[str, float]:
    """Start everything, run the chain and the batch from the UI, and end everything."""
    seconds: dict[str, float] = {}
    began = time.monotonic()
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    try:
        main(["start", "--home", str(home), "--port", str(port)])
        seconds["started"] = time.monotonic() - began
        with open_browser(address) as browser:
            for name, key in [("prompt-chain-warm", "prompt-chain"), ("batch-inference", "batch-summary")]:
                found = httpx.post(
                    f"{address}/api/deployments/filter", json={"deployments": {"name": {"any_": [name]}}}
                ).json()
                browser.open(f"/v2/deployments/deployment/{found[0]['id']}", "Run")
                run = quick_run(browser, address, found[0]["id"])
                is_done = partial(is_completed, address, found[0]["id"])
                browser.wait(is_done, f"the end of {name}", 240)
                browser.open(f"/v2/runs/flow-run/{run['id']}", "Completed")
                seconds.setdefault("first run", time.monotonic() - began)
                browser.click("Artifacts")
                browser.wait(lambda key=key: key in browser.text, f"the artifacts of {name}")
            seconds["both runs"] = time.monotonic() - began
    finally:
        main(["stop", "--home", str(home)])
    return seconds


def quick_run(browser: Browser, address: str, deployment: str) -> dict[str, str]:
    """Start a quick run from the menu of a deployment; the UI shows its parameters once more before it starts it."""
    browser.click("Run")
    time.sleep(1)
    browser.click("Quick run")
    end = time.monotonic() + 120
    while time.monotonic() < end:
        # A form that is still being built may lose the press; it closes once a run is made.
        browser.click("Run", below="Model or endpoint")
        with suppress(TimeoutError):
            return dict(browser.wait(lambda: find_run(address, deployment), "the run", 30))
    raise TimeoutError(f"No run was made. The page:\n{browser.text[:6000]}")


def find_run(address: str, deployment: str) -> dict[str, str] | None:
    """Return the run of a deployment that was started by hand."""
    body = {"deployments": {"id": {"any_": [deployment]}}}
    runs = httpx.post(f"{address}/api/flow_runs/filter", json=body, timeout=30).json()
    return next((run for run in runs if not run["auto_scheduled"]), None)


def is_completed(address: str, deployment: str) -> bool:
    """Tell whether the run that was started by hand has completed."""
    run = find_run(address, deployment)
    return run is not None and run["state_type"] == "COMPLETED"


if __name__ == "__main__":
    assert not can_leave(), "this network has a way out"
    print(json.dumps(run_path(Path(sys.argv[1]))))
