"""A worker machine that has the package from a wheel, and no clone: blocks, deployments, a worker."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.prefect_services import FINAL_STATES, PrefectServices, prefect_services, stop_process, wait_until
from support.wheels import build_wheel, make_environment

# The quick tier has the content of the wheel (`test_packaging`) and a worker that runs deployments (`test_schedules`).
pytestmark = pytest.mark.slow
POOL = "hugging-face"


class WorkerMachine:
    """An environment with the installed package, and a folder that is no clone.

    Args:
        folder: Where to make both.
        services: Server that it works for.
    """

    def __init__(self, folder: Path, services: PrefectServices) -> None:
        self.folder, self.environment = folder / "empty", dict(services.environment)
        self.folder.mkdir()
        # It brings the folder of the tests, and with it the clone.
        self.environment.pop("PYTHONPATH", None)
        self.python = str(make_environment(folder / "venv"))
        packages = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        # The other packages are those of this environment. The editable installation is not followed from here.
        (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        command = ["install", "--quiet", "--no-deps", "--no-index", "--target", str(packages), build_wheel(folder)]
        self._run(sys.executable, "-m", "pip", *command)
        self.package = packages / "prefect_huggingface"

    def run(self, *arguments: str) -> str:
        """Run Python with arguments and return what it prints."""
        return self._run(self.python, *arguments)

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start Python with arguments in the background; its output is in `<name>.log`."""
        with (self.folder.parent / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [self.python, *arguments],
                env=self.environment, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServices]:
    """A server of its own, since the other tests deploy under the same names."""
    with prefect_services(tmp_path_factory.mktemp("installed-server")) as running:
        yield running


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, server: PrefectServices) -> WorkerMachine:
    """A worker machine with everything deployed, by the commands of the README."""
    machine = WorkerMachine(tmp_path_factory.mktemp("machine"), server)
    machine.run("-m", "prefect", "work-pool", "create", POOL, "--type", "process")
    answers = machine.folder / "answers-{date}.jsonl"
    machine.run("-m", "prefect_huggingface.deployments.defaults", "--answers", str(answers))
    file = machine.package / "deployments" / "prefect.yaml"
    machine.run("-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(file), "--all")
    machine.run("-m", "prefect_huggingface.deployments.automations")
    return machine


def start_run(server: PrefectServices, deployment: str, **parameters: Any) -> str:
    """Start a run of a deployment and return its id."""
    found = {each["name"]: each for each in server.post("deployments/filter")}
    return server.start_run(found[deployment]["id"], **parameters)


def wait_for_end(server: PrefectServices, run: str) -> str:
    """Return the last state of a run, with its message."""

    def ended() -> str | None:
        found = server.read_run(run)
        return f"{found['state_type']} {found['state']['message']}" if found["state_type"] in FINAL_STATES else None

    return str(wait_until(ended, 150, f"flow run {run}"))


def test_the_package_is_the_installed_one(machine: WorkerMachine) -> None:
    place = machine.run("-c", "import prefect_huggingface.flows as flows; print(flows.__file__)").strip()
    assert Path(place).is_relative_to(machine.package)
    assert not (machine.folder / "deployments").exists()


def test_a_worker_runs_what_was_deployed(machine: WorkerMachine, server: PrefectServices) -> None:
    worker = machine.start(POOL, "-m", "prefect", "worker", "start", "--pool", POOL)
    try:
        assert wait_for_end(server, start_run(server, "prompt-chain")).startswith("COMPLETED")
        source = machine.folder / "rows.jsonl"
        source.write_text(json.dumps({"country": "Peru"}) + "\n")
        wanted = {"source": str(source), "destination": str(machine.folder / "answers.jsonl")}
        run = start_run(server, "batch-inference", **wanted, prompt="What is the capital of {country}?")
        assert wait_for_end(server, run).startswith("COMPLETED")
        assert json.loads((machine.folder / "answers.jsonl").read_text())["completion"].strip() == "Lima"
    finally:
        stop_process(worker)
    assert worker.returncode is not None
