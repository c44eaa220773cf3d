"""The warm worker with a real server: what stays loaded, several runs at once, cancelling, stopping, killing."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.tasks.storage.journals.journal import Journal
from support.prefect_services import PrefectServices
from support.warm_flows import notes
from support.warm_workers import WarmServices, kill_worker, stop_worker

QUICK = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "OMP_NUM_THREADS": "1"}
BATCH_OPTIONS = {"max_new_tokens": 32, "ignore_eos": True}


@pytest.fixture(scope="module")
def long_model(tiny_openvino: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of the tiny Llama, with room for very long answers."""
    folder = tmp_path_factory.mktemp("models") / "long"
    shutil.copytree(tiny_openvino, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32_768}))
    return {"model_id": str(folder), "engine": {"cache_size_gb": 0.5}, "chat_template": "never"}


@pytest.fixture(scope="module")
def warm(services: PrefectServices) -> Iterator[WarmServices]:
    """A pool with one running worker. Tests that end it start the next one themselves."""
    found = WarmServices(services)
    found.start_worker("warm", "--limit", "8", **QUICK)
    found.wait_for_pool()
    yield found
    took = stop_worker(found.workers[-1])
    assert took < 15, f"stopping took {took:.1f} s"


def begin(warm: WarmServices, deployment: str, path: Path, **parameters: Any) -> str:
    """Start a run and wait until its flow runs."""
    run = warm.start_run(deployment, path=str(path), **parameters)
    warm.wait(lambda: notes(path), 90, "the beginning of the run")
    return run


def events(path: Path) -> list[str]:
    return [note["event"] for note in notes(path)]


def test_the_second_scheduled_run_is_warm(warm: WarmServices, long_model: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "first.jsonl"
    deployment = warm.deploy("support.warm_flows.first_token", parameters={"model": long_model, "path": str(path)})
    schedule = {"active": True, "schedule": {"interval": 4, "anchor_date": "2026-01-01T00:00:00Z"}}
    warm.request("POST", f"deployments/{deployment}/schedules", json=[schedule])
    warm.wait(lambda: len(notes(path)) >= 3, 120, "three scheduled runs")
    warm.request("PATCH", f"deployments/{deployment}", json={"paused": True})

    found = notes(path)
    assert {note["pid"] for note in found} == {warm.workers[-1].pid}
    assert len({tuple(note["loaded"]) for note in found}) == 1, "the model was loaded again"
    warm.wait(lambda: "long" in warm.health("warm"), 30, "the model in the health view")
    page = warm.health("warm")
    assert "OpenVINOTextEngine" in page
    assert "GiB of" in page


def test_several_runs_share_one_engine(warm: WarmServices, long_model: dict[str, Any], tmp_path: Path) -> None:
    deployment = warm.deploy("support.warm_flows.long_answers")
    paths = [str(tmp_path / f"{number}.jsonl") for number in range(3)]
    runs = [warm.start_run(deployment, model=long_model, path=path, tokens=2000, together_with=paths) for path in paths]
    for run in runs:
        assert warm.wait_for_end(run)["name"] == "Completed"
    found = [notes(Path(path)) for path in paths]
    began = max(each[0]["time"] for each in found)
    done = min(note["time"] for each in found for note in each if note["event"] == "done")
    assert began < done, "the runs were not at work at the same time"
    assert {note["pid"] for each in found for note in each} == {warm.workers[-1].pid}
    assert warm.health("warm").count("OpenVINOTextEngine") == 1


@pytest.mark.parametrize(
    "submitted", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["in the flow", "in a task thread"]
)
def test_cancelling_ends_a_long_answer(
    warm: WarmServices, long_model: dict[str, Any], tmp_path: Path, submitted: bool
) -> None:
    other = tmp_path / "other.jsonl"
    deployment = warm.deploy("support.warm_flows.long_answers")
    unharmed = begin(warm, warm.deploy("support.warm_flows.sleeper"), other, seconds=6)
    path = tmp_path / "cancelled.jsonl"
    run = begin(warm, deployment, path, model=long_model, tokens=30_000, submitted=submitted)
    time.sleep(1)
    began = time.monotonic()
    warm.cancel(run)
    assert warm.wait_for_end(run)["name"] == "Cancelled"
    took = time.monotonic() - began
    print(f"cancelled in {took:.1f} s")

    assert took < 15
    assert events(path) == ["began", "left", "hook"]
    assert warm.states(run)[-2:] == ["Cancelling", "Cancelled"]
    tasks = warm.post("task_runs/filter", flow_runs={"id": {"any_": [run]}})
    assert [task["state_type"] for task in tasks] == ["CRASHED"]
    assert warm.wait_for_end(unharmed)["name"] == "Completed"
    # The engine has dropped the request.
    after = tmp_path / "after.jsonl"
    found = warm.start_run(warm.deploy("support.warm_flows.look_at_engines"), path=str(after))
    assert warm.wait_for_end(found)["name"] == "Completed"
    assert notes(after)[0]["requests"] == 0


@pytest.mark.slow
def test_cancelling_ends_an_asynchronous_flow(warm: WarmServices, tmp_path: Path) -> None:
    path = tmp_path / "async.jsonl"
    run = begin(warm, warm.deploy("support.warm_flows.async_sleeper"), path, seconds=120)
    warm.cancel(run)
    assert warm.wait_for_end(run, 30)["name"] == "Cancelled"
    assert "done" not in events(path)


def write_rows(path: Path, rows: int) -> None:
    path.write_text("".join(json.dumps({"number": number}) + "\n" for number in range(rows)))


def start_batch(warm: WarmServices, folder: Path, model: dict[str, Any], name: str) -> str:
    """Start a batch over the rows of a folder."""
    deployment = warm.deploy("prefect_huggingface.flows.batches.batch_inference")
    return warm.start_run(
        deployment, model=model, source=str(folder / "in.jsonl"), destination=str(folder / name),
        prompt="Say {number}", options=BATCH_OPTIONS, in_flight=4, show_progress=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "end", [pytest.param(stop_worker, marks=pytest.mark.slow), kill_worker], ids=["SIGTERM", "SIGKILL"]
)
def test_the_next_worker_goes_on(warm: WarmServices, long_model: dict[str, Any], tmp_path: Path, end: Any) -> None:
    write_rows(tmp_path / "in.jsonl", 2000)
    whole = start_batch(warm, tmp_path, long_model, "whole.jsonl")
    assert warm.wait_for_end(whole)["name"] == "Completed"
    run = start_batch(warm, tmp_path, long_model, "out.jsonl")
    journal = Journal.beside(str(tmp_path / "out.jsonl"))
    warm.wait(lambda: journal.place.exists() and len(journal.names()) > 1, 60, "the first rows")
    end(warm.workers[-1])
    left = warm.states(run)[-1]
    assert left == ("AwaitingRetry" if end is stop_worker else "Running")
    warm.start_worker("warm", "--limit", "8", **QUICK)

    state = warm.wait_for_end(run, 120)
    assert state["name"] == "Completed", state
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert warm.states(run).count("Running") == 2


@pytest.mark.slow
def test_a_run_that_was_to_be_cancelled_is_cancelled_by_the_next_worker(warm: WarmServices, tmp_path: Path) -> None:
    run = begin(warm, warm.deploy("support.warm_flows.sleeper"), tmp_path / "sleep.jsonl", seconds=120)
    kill_worker(warm.workers[-1])
    warm.cancel(run)
    warm.start_worker("warm", "--limit", "8", **QUICK)
    assert warm.wait_for_end(run, 60)["name"] == "Cancelled"
    assert events(tmp_path / "sleep.jsonl")[-1] == "hook"


@pytest.mark.slow
def test_an_idle_model_is_closed(services: PrefectServices, long_model: dict[str, Any], tmp_path: Path) -> None:
    idle = WarmServices(services, "idle-pool")
    worker = idle.start_worker("idle", "--idle-minutes", "0.05", "--memory-gb", "3", **QUICK)
    try:
        idle.wait_for_pool()
        path = tmp_path / "first.jsonl"
        run = idle.start_run(idle.deploy("support.warm_flows.first_token"), model=long_model, path=str(path))
        assert idle.wait_for_end(run)["name"] == "Completed"
        idle.wait(lambda: "1 models that nobody used" in idle.log("idle").read_text(), 40, "the closing of the model")
        idle.wait(lambda: "of 3.00 GiB" in idle.health("idle"), 20, "the health view")
    finally:
        stop_worker(worker)
    status = subprocess.run(
        [*idle.command("idle"), "--status"], env=services.environment, capture_output=True, text=True, timeout=60
    )
    assert status.returncode == 1
    assert "| State | stopped |" in status.stdout
