"""The Prefect tasks of downloads: retries of what passes, waits that the Hub asks for, progress, and plain records."""

from __future__ import annotations

import io
import json
import time

import pytest
from prefect import artifacts, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter
from prefect.client.schemas.sorting import TaskRunSort
from prefect.states import Failed
from rich.console import Console

from prefect_huggingface.blocks import LocalModel
from prefect_huggingface.tasks.downloads import download_model, extra_wait, may_retry, plan_download
from prefect_huggingface.tasks.errors import PlanError
from prefect_huggingface.tasks.hub_errors import (
    CorruptFileError,
    DiskFullError,
    GatedRepositoryError,
    HubUnavailableError,
    RateLimitedError,
)
from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot
from prefect_huggingface.tasks.storage.hub.progress import Progress
from support.hub_models import MEGABYTE, check_snapshot, hub_model, model_files

# The same task without the minutes between its retries.
quick = download_model.with_options(retry_delay_seconds=[0, 0, 0])


@flow
def download_flow(model):
    return quick(model)


def task_runs():
    with get_client(sync_client=True) as client:
        # The server gives 200 of all the runs of the session, so that the newest must come first.
        newest = client.read_task_runs(sort=TaskRunSort.EXPECTED_START_TIME_DESC, limit=5)
        return sorted(newest, key=lambda run: run.created)


def test_the_task_returns_the_snapshot_in_a_flow(hub, tmp_path, prefect_server):
    hub.create("org/model", files := model_files(1000))
    check_snapshot(download_flow(hub_model(hub, tmp_path)).path, files)


@pytest.fixture
def folder(tmp_path):
    for name, content in model_files(1000).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_the_task_takes_a_folder_as_well(folder):
    snapshot = download_model.fn(LocalModel(model_id=str(folder), backend="torch"))
    assert snapshot.commit.startswith("local-")


def test_prefect_retries_what_passes(hub, tmp_path, prefect_server):
    hub.create("org/model", files := model_files(3 * MEGABYTE))
    hub.fault("cut", after=2 * MEGABYTE)
    hub.fault("status", status=503)
    snapshot = download_flow(hub_model(hub, tmp_path, settings={"max_attempts": 1}))
    check_snapshot(snapshot.path, files)
    # The second and third run of the task went on where the first one was cut.
    assert [r.start for r in hub.journal.gets(place="cdn")] == [0, 2 * MEGABYTE, 2 * MEGABYTE]
    assert hub.journal.sent(place="cdn") == 3 * MEGABYTE
    assert task_runs()[-1].run_count == 3


def test_prefect_does_not_retry_what_stays(hub, tmp_path, prefect_server):
    hub.create("org/model", model_files(1000), gated="manual")
    with pytest.raises(GatedRepositoryError):
        download_flow(hub_model(hub, tmp_path))
    assert task_runs()[-1].run_count == 1
    assert len(hub.journal.gets("/revision/")) == 1


def test_prefect_waits_as_long_as_the_hub_asks(hub, tmp_path, prefect_server):
    hub.create("org/model", model_files(1000))
    hub.fault("status", "api", status=429, headers={"Retry-After": "2"})
    started = time.monotonic()
    download_flow(hub_model(hub, tmp_path, settings={"max_attempts": 1}))
    assert time.monotonic() - started >= 2.0
    assert task_runs()[-1].run_count == 2


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (HubUnavailableError("x"), True),
        (RateLimitedError("x", wait_seconds=5.0), True),
        (RateLimitedError("x", wait_seconds=3600.0), False),
        (GatedRepositoryError("x"), False),
        (CorruptFileError("x"), False),
        (DiskFullError("x"), False),
        (ValueError("x"), False),
    ],
)
def test_only_what_passes_soon_is_retried(error, retried):
    class Run:
        run_count = 1

    assert may_retry(download_model, Run(), Failed(data=error, message="failed")) is retried


def test_the_delay_of_the_retry_counts_as_waiting():
    error = RateLimitedError("x", wait_seconds=100.0)
    assert [extra_wait(error, run, [10.0, 60.0, 300.0]) for run in (1, 2, 3, 4)] == [90.0, 40.0, 0.0, 0.0]
    assert extra_wait(error, 1, None) == 100.0
    assert extra_wait(HubUnavailableError("x"), 1, [10.0]) == 0.0


def test_a_run_shows_its_progress_in_an_artifact(hub, tmp_path, prefect_server):
    hub.create("org/shown", model_files(3 * MEGABYTE))
    hub.fault("stall_body", after=MEGABYTE, seconds=1.5)
    download_flow(hub_model(hub, tmp_path, "org/shown", settings={"timeout_seconds": 30}))
    with get_client(sync_client=True) as client:
        shown = client.read_artifacts(artifact_filter=ArtifactFilter(key={"any_": ["download-org-shown"]}))
    assert [a.type for a in shown] == ["progress"]
    assert shown[0].data == 100.0


def test_the_artifact_changes_once_a_second_at_most(prefect_server, monkeypatch):
    written = []
    update = artifacts.update_progress_artifact

    def note(*arguments, progress, **content):
        written.append(progress)
        return update(*arguments, progress=progress, **content)

    monkeypatch.setattr(artifacts, "update_progress_artifact", note)

    @flow
    def show():
        progress = Progress("Download org/often")
        progress.total = 100
        for _ in range(100):
            progress.advance(1)
            progress.show()
            time.sleep(0.015)
        progress.close()

    show()
    assert 2 <= len(written) <= 4
    assert written[-1] == 100.0


def test_there_is_no_artifact_outside_of_a_run(hub, tmp_path, recwarn):
    hub.create("org/model", model_files(1000))
    download_model.fn(hub_model(hub, tmp_path))
    assert not [w for w in recwarn if "artifact" in str(w.message).lower()]


def test_the_terminal_shows_one_bar_over_the_bytes(hub, tmp_path):
    hub.create("org/model", files := model_files(3 * MEGABYTE))
    hub.fault("stall_body", after=2 * MEGABYTE, seconds=0.6)
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    progress = Progress("Download org/model", screen)
    fetch_snapshot(hub_model(hub, tmp_path, settings={"timeout_seconds": 30}), progress)
    assert progress.done == progress.total == sum(map(len, files.values()))
    text = screen.file.getvalue()
    assert "Download org/model" in text
    assert "3.1/3.1 MB" in text
    assert "2.1/3.1 MB" in text


def test_a_plan_is_plain_data(hub, tmp_path, prefect_server):
    hub.create("org/model", model_files(1000))

    @flow
    def plan_flow(model):
        return plan_download(model)

    plan = plan_flow(hub_model(hub, tmp_path))
    assert plan.missing_bytes > 1000
    assert json.loads(json.dumps(plan.as_dict()))["files"][0]["path"] == "config.json"


def test_there_is_no_plan_for_a_folder(folder):
    with pytest.raises(PlanError, match="is on this machine"):
        plan_download.fn(LocalModel(model_id=str(folder)))
