"""A process worker and its runs under the hands of an operator, who cancels, ends and kills them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from support.prefect_services import FINAL_STATES, PrefectServices, stop_process, wait_until

FLOWS = {
    "batch": "prefect_huggingface.flows.batches.batch_inference",
    "prepare": "prefect_huggingface.flows.preparation.prepare_model",
}


class Operator:
    """Starts runs of deployments in a process work pool of its own, and ends them in every way.

    Args:
        services: Server that the runs belong to.
        pool: Name of the work pool, which is made.
        folder: Folder for the deployments and the log of the worker.
    """

    def __init__(self, services: PrefectServices, pool: str, folder: Path) -> None:
        self.services, self.pool, self.folder = services, pool, folder
        lines = ["pull: []", "deployments:"]
        for name, entrypoint in FLOWS.items():
            lines.append(f"  - {{name: {pool}-{name}, entrypoint: {entrypoint}, work_pool: {{name: {pool}}}}}")
        (folder / "prefect.yaml").write_text("\n".join(lines) + "\n")
        services.run("work-pool", "create", pool, "--type", "process")
        services.run("deploy", "--prefect-file", str(folder / "prefect.yaml"), "--all", cwd=folder)
        found = services.post("deployments/filter")
        self.ids = {deployment["name"].rpartition("-")[2]: deployment["id"] for deployment in found
                    if deployment["name"].startswith(f"{pool}-")}  # fmt: skip
        self.worker = self.start_worker()

    def start_worker(self) -> subprocess.Popen[bytes]:
        """Start the worker of the pool."""
        self.worker = self.services.start(f"worker-{self.pool}", "worker", "start", "--pool", self.pool)
        return self.worker

    def close(self) -> None:
        """End the worker."""
        stop_process(self.worker)

    def start(self, flow: str, **parameters: Any) -> str:
        """Start a run and return its id."""
        return self.services.start_run(self.ids[flow], **parameters)

    def read(self, run: str) -> dict[str, Any]:
        """Return what the server knows of a run."""
        return self.services.read_run(run)

    def process_of(self, run: str) -> int:
        """Return the process of a run, once it is known."""
        text = wait_until(lambda: self.read(run)["infrastructure_pid"], 300, "the start of the run's process")
        return int(str(text).rpartition(":")[2])

    def wait_for(self, run: str, *states: str, seconds: float = 120) -> str:
        """Return the state of a run once it is one of those, or a last one where none is named."""

        def reached() -> str | None:
            state = str(self.read(run)["state_type"])
            return state if state in (states or FINAL_STATES) else None

        return str(wait_until(reached, seconds, f"state {states or 'at the end'} of the run"))

    def cancel(self, run: str) -> None:
        """Cancel a run as the UI does."""
        self.services.post(f"flow_runs/{run}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})

    def log_of(self, run: str) -> list[str]:
        """Return the messages of the log of a run, in order."""
        wanted = {"flow_run_id": {"any_": [run]}}
        return [line["message"] for line in self.services.post("logs/filter", logs=wanted, sort="TIMESTAMP_ASC")]

    def disturb(self, way: str, run: str, process: int) -> None:
        """End a run in a way, and start the worker again where it was hit."""
        if way == "cancel":
            self.cancel(run)
        elif way in ("SIGTERM of the run", "SIGKILL of the run"):
            os.kill(process, signal.Signals[way.split()[0]])
        else:
            os.kill(self.worker.pid, signal.Signals[way.split()[0]])
            self.worker.wait(120)
            self.start_worker()


def is_alive(process: int) -> bool:
    """Tell whether a process is there and is not only waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_end(process: int, seconds: float) -> float:
    """Wait for the end of a process and return how long that took."""
    began = time.monotonic()
    wait_until(lambda: not is_alive(process), seconds, f"the end of process {process}", every=0.05)
    return time.monotonic() - began
