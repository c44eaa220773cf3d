"""A real Prefect server and real workers as processes of their own, as an operator starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from prefect.events.worker import EventsWorker

from support.ports import free_port

FINAL_STATES = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def wait_until(condition, seconds: float, what: str, every: float = 0.2):
    """Return the first true value of a condition.

    Raises:
        TimeoutError: If there is none in time.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(every)
    raise TimeoutError(f"{what} took more than {seconds} s")


class PrefectServices:
    """One server and the processes that talk to it, all with a Prefect home of their own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.environment = {
            **os.environ,
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_UI_API_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }

    def start(self, name: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start `prefect ARGUMENTS` in the background, its output in `<name>.log` of the home."""
        log = (self.home / f"{name}.log").open("ab")
        return subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments],
            env={**self.environment, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *arguments: str, cwd: Path | None = None) -> str:
        """Run `prefect ARGUMENTS` to its end and return what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
            env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def is_healthy(self) -> bool:
        """Whether the server answers."""
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def request(self, method: str, path: str, **arguments: object) -> httpx.Response:
        """Send a request, again where SQLite is too busy to take it, as Prefect's own client does."""
        for _ in range(60):
            response = httpx.request(method, f"{self.url}/{path}", timeout=120, **arguments)
            if response.status_code != 503:
                break
            time.sleep(0.5)
        return response

    def post(self, path: str, **body: object):
        """Post to the server's API and return the answer."""
        return self.request("POST", path, json=body).raise_for_status().json()

    def start_run(self, deployment: str, **parameters: object) -> str:
        """Start a run of a deployment, given by its id, as the form does, and return the id of the run."""
        return str(self.post(f"deployments/{deployment}/create_flow_run", parameters=parameters)["id"])

    def read_run(self, run: str) -> dict:
        """Return what the server knows of a flow run."""
        return dict(self.request("GET", f"flow_runs/{run}").raise_for_status().json())


def stop_process(process: subprocess.Popen[bytes], seconds: float = 20) -> None:
    """End a process and what it started, gently first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
            return
        except ProcessLookupError:
            assert process.poll() is not None, f"{process.args} runs on: it has no process group of its own."
            return
        except subprocess.TimeoutExpired:
            continue


@contextmanager
def prefect_services(home: Path) -> Iterator[PrefectServices]:
    """Run a Prefect server until the block ends."""
    home.mkdir(parents=True, exist_ok=True)
    services = PrefectServices(home)
    server = services.start("server", "server", "start", "--host", "127.0.0.1", "--port", str(services.port))
    try:
        wait_until(services.is_healthy, 300, "the start of the Prefect server")
        yield services
    finally:
        # This process says what it has to say of its runs while the server still listens.
        EventsWorker.drain_all(timeout=30)
        stop_process(server)
