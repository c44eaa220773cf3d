"""What a warm worker refuses, and how it says so."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.deployments.warm.idleness import IDLE_VARIABLE, idle_minutes
from prefect_huggingface.deployments.warm.marks import WorkerMark
from prefect_huggingface.tasks.errors import WorkerError
from support.ports import free_port
from support.prefect_services import PrefectServices
from support.warm_workers import WarmServices, stop_worker

POOL = "refusing-pool"


@pytest.fixture(scope="module")
def warm(services: PrefectServices) -> Iterator[WarmServices]:
    found = WarmServices(services, POOL)
    worker = found.start_worker("refusing")
    found.wait_for_pool()
    yield found
    stop_worker(worker)


def failure(warm: WarmServices, deployment: str, **parameters: Any) -> str:
    """Start a run that cannot work, and return the message of its state."""
    state = warm.wait_for_end(warm.start_run(deployment, **parameters))
    assert state["type"] == "FAILED", state
    return str(state["message"])


def test_a_file_is_no_entrypoint(warm: WarmServices) -> None:
    message = failure(warm, warm.deploy("flows.py:my_flow"))
    assert "'flows.py:my_flow' is a file" in message
    assert "'package.module.flow'" in message


def test_a_module_that_is_not_installed(warm: WarmServices) -> None:
    message = failure(warm, warm.deploy("nowhere.flows.my_flow", importable=False))
    assert "'nowhere.flows.my_flow' cannot be imported" in message


def test_pull_steps_are_refused_but_for_a_folder(warm: WarmServices, tmp_path: Path) -> None:
    entrypoint = "support.warm_flows.look_at_engines"
    clone = [{"prefect.deployments.steps.git_clone": {"repository": "https://example.com/a.git"}}]
    message = failure(warm, warm.deploy(entrypoint, "cloned", pull_steps=clone), path=str(tmp_path / "notes"))
    assert "prefect.deployments.steps.git_clone" in message

    move = [{"prefect.deployments.steps.set_working_directory": {"directory": str(tmp_path)}}]
    run = warm.start_run(warm.deploy(entrypoint, "moved", pull_steps=move), path=str(tmp_path / "notes"))
    assert warm.wait_for_end(run)["name"] == "Completed"
    warm.wait(lambda: any(f"not in {tmp_path}" in line for line in warm.logs(run)), 20, "the log of the run")


def test_a_model_folder_that_was_deleted(warm: WarmServices, tmp_path: Path) -> None:
    deployment = warm.deploy("support.warm_flows.first_token")
    gone = {"model_id": str(tmp_path / "gone")}
    assert str(tmp_path / "gone") in failure(warm, deployment, model=gone, path=str(tmp_path / "notes"))


def test_a_block_that_is_missing(warm: WarmServices, tmp_path: Path) -> None:
    deployment = warm.deploy("support.warm_flows.first_token")
    missing = {"$ref": {"block_document_slug": "hugging-face-local-model/missing"}}
    run = warm.start_run(deployment, model=missing, path=str(tmp_path / "notes"))
    state = warm.wait_for_end(run)
    assert state["type"] in ("FAILED", "CRASHED")
    assert "block" in state["message"].lower()


def refusal(services: PrefectServices, *arguments: str, **environment: str) -> str:
    """Run the command, which ends at once, and return what it says."""
    command = [*WarmServices(services).command("refused"), *arguments]
    done = subprocess.run(
        command, env={**services.environment, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_the_command_refuses_what_cannot_work(services: PrefectServices) -> None:
    services.post("work_pools/", name="of-processes", type="process")
    assert "'of-processes' is of the type 'process'" in refusal(services, "--pool", "of-processes")
    assert "prefect work-pool create missing" in refusal(services, "--pool", "missing", "--no-create-pool")
    nobody = f"http://127.0.0.1:{free_port()}/api"
    assert f"No Prefect server answers at '{nobody}'" in refusal(services, PREFECT_API_URL=nobody)
    assert "'0' is no number of runs" in refusal(services, "--limit", "0")
    assert "'much' is no number" in refusal(services, "--memory-gb", "much")


def test_idle_minutes_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IDLE_VARIABLE, "7.5")
    assert idle_minutes() == 7.5
    monkeypatch.setenv(IDLE_VARIABLE, "soon")
    with pytest.raises(WorkerError, match="'soon'"):
        idle_minutes()


def test_a_mark_tells_whether_its_process_is_gone() -> None:
    own = WorkerMark.own("a name: with colons")
    assert WorkerMark.parse(str(own)) == own
    assert own.is_here
    assert not own.is_gone
    later = WorkerMark(own.pid, own.host, own.started - 60, own.name)
    assert later.is_gone, "another process had the number before"
    done = subprocess.Popen(["true"])
    done.wait()
    assert WorkerMark(done.pid, own.host, own.started, "x").is_gone
    assert not WorkerMark(done.pid, "another-machine", own.started, "x").is_gone
    assert WorkerMark.parse(None) is None
    assert WorkerMark.parse("12345") is None
