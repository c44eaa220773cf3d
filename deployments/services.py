"""A local Prefect server, worker and model server with all deployments, started by one command and ended by another.

    python -m prefect_huggingface.deployments.services start [--port 4200] [--home .deployments]
    python -m prefect_huggingface.deployments.services stop
    python -m prefect_huggingface.deployments.services status

Everything listens on this machine only, and what the server keeps lies in its home. Started again, what runs already is
left alone, and the flows are deployed again; stopped, exactly those processes end.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock, Timeout

from prefect_huggingface.deployments.defaults import ANSWERS
from prefect_huggingface.deployments.processes import (
    ProcessRecord,
    end_process,
    start_process,
    wait_for,
)

HOST = "127.0.0.1"
PREFECT_FILE = Path(__file__).parent / "prefect.yaml"
POOL = "hugging-face"
START_SECONDS = 180.0
PORT_SECONDS = 3.0
# Settings of another server that this one must not get.
FOREIGN = ("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_PROFILE", "PREFECT_SERVER_API_AUTH_STRING")
FOREIGN_PREFIXES = ("PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_")


class LocalServices:
    """The server, the worker and the model server of one home. The port of the latter is the next one."""

    def __init__(self, home: Path, port: int | None = None) -> None:
        """Take the port of the home's server where none is given."""
        self.home = home.absolute()
        self.record = ProcessRecord(self.home / "processes.json")
        self.port = port or self._read_port() or 4200
        self.address = f"http://{HOST}:{self.port}"
        self.model_server = f"http://{HOST}:{self.port + 1}"
        self.services = {name: each for name, each in self.record.read().items() if each.is_alive()}

    @property
    def commands(self) -> dict[str, list[str]]:
        """What is started, by its name, in order."""
        prefect, models = [sys.executable, "-m", "prefect"], [sys.executable, "-m", f"{__package__}.model_server"]
        return {
            "server": [*prefect, "server", "start", "--host", HOST, "--port", str(self.port)],
            "worker": [*prefect, "worker", "start", "--pool", POOL, "--type", "process", "--name", "processes"],
            "model-server": [*models, "--block", "all", "--host", HOST, "--port", str(self.port + 1)],
        }

    @property
    def environment(self) -> dict[str, str]:
        """Environment of everything that is started."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in FOREIGN and not name.startswith(FOREIGN_PREFIXES)
        }
        return {
            **kept,
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_API_URL": f"{self.address}/api",
            "PREFECT_UI_API_URL": f"{self.address}/api",
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "DO_NOT_TRACK": "1",
        }

    def is_healthy(self) -> bool:
        """Tell whether the server answers."""
        try:
            return httpx.get(f"{self.address}/api/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def serves_models(self) -> bool:
        """Return whether the model server answers."""
        try:
            return httpx.get(f"{self.model_server}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def start(self) -> list[str]:
        """Start what does not run, deploy everything, and return the names of what was started.

        Raises:
            SystemExit: If the port is taken, the server runs at another one, or if something ends or does not answer in
                time.
        """
        running = self._read_port()
        if "server" in self.services and running not in (None, self.port):
            raise SystemExit(f"Everything runs at port {running} already. `make stop` ends it.")
        missing = [name for name in self.commands if name not in self.services]
        # The port of a server that was killed is free a moment after its process is gone.
        for name, port in (("server", self.port), ("model-server", self.port + 1)):
            if name in missing:
                self._check_port(port)
        (self.home / "prefect").mkdir(parents=True, exist_ok=True)
        if "server" in missing:
            self._start("server", "Starting the Prefect server")
            (self.home / "port").write_text(str(self.port), encoding="utf-8")
        self._await("server", self.is_healthy)
        defaults = ("--answers", self._answers(), "--model-server", f"{self.model_server}/v1")
        self._run("Saving the default blocks", "-m", f"{__package__}.defaults", *defaults)
        for name in missing:
            if name != "server":
                self._start(name, f"Starting the {name}")
        self._await("worker", self._has_worker)
        self._await("model-server", self.serves_models)
        deploy = ("-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(PREFECT_FILE), "--all")
        # Always: deployments hold what the blocks and variables were when they were deployed.
        self._run("Deploying the flows", *deploy)
        self._run("Creating the automations", "-m", f"{__package__}.automations")
        self._run("Finishing their forms", "-m", f"{__package__}.forms")
        return missing

    def stop(self) -> list[str]:
        """End what was started, the server last, and return the names of what was running."""
        ended = [name for name in reversed(self.commands) if name in self.services and self._end(name)]
        self.record.remove()
        return ended

    def post(self, path: str, **body: Any) -> Any:
        """Post to the server's API and return the answer."""
        return httpx.post(f"{self.address}/api/{path}", json=body, timeout=30).raise_for_status().json()

    def _check_port(self, port: int) -> None:
        if not wait_for(lambda: not _is_taken(port), PORT_SECONDS):
            raise SystemExit(
                f"Port {port} is in use by another program. End that, or choose another port: "
                f"`make deployments PORT={self.port + 100}`."
            )

    def _read_port(self) -> int | None:
        try:
            return int((self.home / "port").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _answers(self) -> str:
        return str(self.home / "answers" / ANSWERS)

    def _start(self, name: str, sentence: str) -> None:
        print(f"{sentence} ...", flush=True)
        self.services[name] = start_process(name, self.commands[name], self.home, self.environment)
        self.record.write(self.services)

    def _end(self, name: str) -> bool:
        print(f"Ending the {name} ...", flush=True)
        return end_process(self.services[name])

    def _await(self, name: str, condition: Any) -> None:
        service = self.services[name]
        wait_for(lambda: condition() or not service.is_alive(), START_SECONDS)
        if not service.is_alive() or not condition():
            raise SystemExit(f"The {name} did not start. The end of {service.log}:\n{service.read_end_of_log()}")

    def _run(self, sentence: str, *arguments: str) -> None:
        print(f"{sentence} ...", flush=True)
        done = subprocess.run(
            [sys.executable, *arguments], env=self.environment, cwd=self.home, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{sentence} failed:\n{(done.stdout + done.stderr)[-2000:]}")

    def _has_worker(self) -> bool:
        try:
            workers = self.post(f"work_pools/{POOL}/workers/filter")
        except httpx.HTTPError:
            return False
        return any(worker["status"] == "ONLINE" for worker in workers)


def describe(local: LocalServices) -> str:
    """Return what runs, and what to click."""
    lines = [f"  {name:<12} process {each.pid}, log {each.log}" for name, each in local.services.items()]
    return "\n".join(
        [
            f"The Prefect UI is at {local.address}, the model server at {local.model_server}/v1",
            *lines,
            "Try it: Deployments > prompt-chain-warm > Run > Quick run > Run. The answers are under Artifacts.",
            "        Deployments > batch-inference > Run > Custom run shows the form of the nightly batch.",
            "`make stop` ends all of this; what the server knows stays in " + str(local.home) + ".",
        ]
    )


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def run_command(command: str, home: Path, port: int | None) -> None:
    """Start, stop or describe the services of a home."""
    home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(home / "lock", timeout=0):
            local = LocalServices(home, port)
            if command == "start":
                started = local.start()
                print("" if started else "Everything runs already. The flows were deployed again.")
                print(describe(local))
            elif command == "stop":
                ended = local.stop()
                print(f"Ended: {', '.join(ended)}." if ended else "Nothing was running.")
            else:
                print(describe(local) if local.services else "Nothing is running. Start it with `make deployments`.")
    except Timeout:
        raise SystemExit(f"Another `make deployments` or `make stop` works on {home}. Wait for it.") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="prefect_huggingface.deployments.services", description=__doc__)
    parser.add_argument("command", choices=["start", "stop", "status"])
    parser.add_argument("--home", type=Path, default=Path(".deployments"), help="folder of the server")
    parser.add_argument(
        "--port",
        type=int,
        choices=range(1, 65535),
        metavar="PORT",
        default=None,
        help="port of the server (default: 4200); the model server takes the next one",
    )
    given = parser.parse_args(arguments)
    run_command(given.command, given.home, given.port)


if __name__ == "__main__":
    main()
