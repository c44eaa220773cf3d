"""Warm workers as processes of their own, and deployments of flows that they run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import psutil

from support.prefect_services import FINAL_STATES, PrefectServices, wait_until

POOL = "hugging-face-warm"
TESTS = Path(__file__).parent.parent


class WarmServices:
    """Workers, deployments and runs of one work pool on a server.

    Args:
        services: The server.
        pool: Name of the work pool. The first worker creates it.
    """

    def __init__(self, services: PrefectServices, pool: str = POOL) -> None:
        self.services = services
        self.pool = pool
        self.workers: list[subprocess.Popen[bytes]] = []

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Send a request, and return an answer that is none of an error."""
        return self.services.request(method, path, **arguments).raise_for_status()

    def post(self, path: str, **body: Any) -> Any:
        """Post to the server's API and return the answer."""
        return self.request("POST", path, json=body).json()

    def start_worker(self, name: str = "warm", *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a worker; its output is `<name>.log` in the home of the server."""
        path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
        with self.log(name).open("ab") as log:
            worker = subprocess.Popen(
                [*self.command(name), *arguments],
                env={**self.services.environment, "PYTHONPATH": path, **environment},
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.workers.append(worker)
        return worker

    def command(self, name: str) -> list[str]:
        """Return the command that starts a worker."""
        module = "prefect_huggingface.deployments.warm_worker"
        return [sys.executable, "-m", module, "--pool", self.pool, "--name", name]

    def log(self, name: str) -> Path:
        """File with the output of a worker."""
        return self.services.home / f"{name}.log"

    def wait_for_pool(self) -> None:
        """Wait until a worker has created the pool."""
        wanted = {"name": {"any_": [self.pool]}}
        self.wait(lambda: self.post("work_pools/filter", work_pools=wanted), 120, "the work pool of the worker")

    def wait(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        """Return the first true value of a condition, as long as the last worker lives."""

        def looked() -> Any:
            assert self.workers[-1].poll() is None, "the worker has ended; see its log"
            return condition()

        return wait_until(looked, seconds, what)

    def deploy(self, entrypoint: str, name: str = "test", **settings: Any) -> str:
        """Make a deployment of a flow and return its id. `a.b.c` is imported for its form; a file is not."""
        from prefect.utilities.callables import parameter_schema

        schema: dict[str, Any] = {}
        flow_name = entrypoint
        if ":" not in entrypoint and settings.pop("importable", True):
            module, attribute = entrypoint.rsplit(".", 1)
            flow = getattr(import_module(module), attribute)
            schema, flow_name = dict(parameter_schema(flow)), flow.name
        flow_id = self.post("flows/", name=flow_name)["id"]
        made = self.post(
            "deployments/", name=f"{name}-{self.pool}", flow_id=flow_id, entrypoint=entrypoint,
            work_pool_name=self.pool, parameter_openapi_schema=schema, **settings,
        )  # fmt: skip
        return str(made["id"])

    def start_run(self, deployment: str, **parameters: Any) -> str:
        """Start a run of a deployment now, as the form does, and return its id."""
        return self.services.start_run(deployment, **parameters)

    def read(self, run: str) -> dict[str, Any]:
        """Return a flow run."""
        return self.services.read_run(run)

    def state(self, run: str) -> str:
        """Return the type of the state of a run."""
        return str((self.read(run)["state"] or {}).get("type"))

    def wait_for_end(self, run: str, seconds: float = 90) -> dict[str, Any]:
        """Wait for the end of a run, and return its last state."""
        self.wait(lambda: self.state(run) in FINAL_STATES, seconds, f"flow run {run}")
        found: dict[str, Any] = self.read(run)["state"]
        return found

    def cancel(self, run: str) -> None:
        """Cancel a run as the button of the UI does."""
        self.post(f"flow_runs/{run}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})

    def states(self, run: str) -> list[str]:
        """Return the names of the states of a run, in order."""
        found = self.request("GET", f"flow_run_states/?flow_run_id={run}").json()
        return [str(state["name"]) for state in found]

    def logs(self, run: str) -> list[str]:
        """Return the lines of the log of a run that have reached the server."""
        found = self.post("logs/filter", logs={"flow_run_id": {"any_": [run]}}, sort="TIMESTAMP_ASC")
        return [str(line["message"]) for line in found]

    def health(self, name: str) -> str:
        """Return the health view of a worker, or nothing where there is none yet."""
        found = self.post("artifacts/filter", artifacts={"key": {"any_": [f"warm-worker-{name}"]}})
        assert len(found) <= 1, "the health view is not changed in place"
        return str(found[0]["data"]) if found else ""


def stop_worker(process: subprocess.Popen[bytes], seconds: float = 20) -> float:
    """End a worker gently, and return how many seconds that took. It must leave no process behind."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(seconds)
    took = time.monotonic() - began
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive, f"the worker left {alive}"
    return took


def kill_worker(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker at once. What it has started must end by itself."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait(20)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, f"the worker left {alive}"
