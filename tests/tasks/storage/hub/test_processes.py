"""Downloads in several processes: killed at any point, and several at once."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from prefect_huggingface.tasks.hub_errors import StoreBusyError
from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot
from support.hub_models import MEGABYTE, check_snapshot, hub_model, model_files
from support.hub_workers import DownloadProcess, wait_for

SIZE = 6 * MEGABYTE
WEIGHTS = "model.safetensors"
PATIENT = {"timeout_seconds": 60}


def partial_size(store: Path) -> int:
    """Return the size of the largest content that is not complete."""
    return max((p.stat().st_size for p in store.rglob("partials/*") if p.exists()), default=-1)


@pytest.fixture
def files(hub):
    files = model_files(SIZE)
    hub.create("org/model", files)
    return files


@pytest.mark.parametrize("point", [0, 1_000_003, SIZE - 1])
def test_a_killed_download_is_continued_by_another_process(hub, files, tmp_path, point):
    hub.fault("stall_body", after=point)
    first = DownloadProcess(hub, tmp_path, settings=PATIENT)
    wait_for(lambda: partial_size(tmp_path) == point and hub.journal.gets(place="cdn"))
    first.kill()
    assert not list(tmp_path.rglob("manifests/*.json"))
    check_snapshot(fetch_snapshot(hub_model(hub, tmp_path)).path, files)
    assert [r.start for r in hub.journal.gets(place="cdn")] == [0, point]
    assert hub.journal.sent(place="cdn") == SIZE


def test_a_download_that_is_killed_after_its_last_large_file_costs_no_byte_of_it_again(hub, files, tmp_path):
    hub.fault("stall", "resolve", path="/config.json")
    process = DownloadProcess(hub, tmp_path, settings=PATIENT)
    name = hashlib.sha256(files[WEIGHTS]).hexdigest()
    wait_for(lambda: list(tmp_path.rglob(f"blobs/{name}")))
    process.kill()
    assert not list(tmp_path.rglob("manifests/*.json"))
    check_snapshot(fetch_snapshot(hub_model(hub, tmp_path)).path, files)
    assert len(hub.journal.gets(place="cdn")) == 1


def test_a_download_that_is_killed_again_and_again_is_finished_in_the_end(hub, files, tmp_path):
    for part in range(1, 5):
        hub.fault("stall_body", after=MEGABYTE)
        process = DownloadProcess(hub, tmp_path, settings=PATIENT)
        wait_for(lambda part=part: partial_size(tmp_path) == part * MEGABYTE)
        process.kill()
    check_snapshot(fetch_snapshot(hub_model(hub, tmp_path)).path, files)
    assert hub.journal.sent(place="cdn") == SIZE


def test_a_killed_download_whose_last_bytes_are_wrong_is_read_again(hub, files, tmp_path):
    # What a machine leaves behind that loses its power.
    hub.fault("stall_body", after=MEGABYTE)
    process = DownloadProcess(hub, tmp_path, settings=PATIENT)
    wait_for(lambda: partial_size(tmp_path) == MEGABYTE)
    process.kill()
    partial = next(p for p in tmp_path.rglob("partials/*") if p.stat().st_size == MEGABYTE)
    partial.write_bytes(partial.read_bytes()[: MEGABYTE // 2] + bytes(MEGABYTE // 2))
    check_snapshot(fetch_snapshot(hub_model(hub, tmp_path)).path, files)


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_several_processes_at_once_download_once(hub, files, tmp_path, count):
    processes = [DownloadProcess(hub, tmp_path, settings=PATIENT) for _ in range(count)]
    answers = {process.result() for process in processes}
    assert len(answers) == 1
    state, _, path = answers.pop()
    assert state == "done"
    check_snapshot(Path(path), files)
    assert len(hub.journal.gets(place="cdn")) == 1
    assert hub.journal.sent(place="cdn") == SIZE


def test_several_threads_at_once_download_once(hub, files, tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch_snapshot(hub_model(hub, tmp_path)))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert hub.journal.sent(place="cdn") == SIZE


def test_whoever_waits_takes_over_from_a_killed_process(hub, files, tmp_path):
    hub.fault("stall_body", after=2 * MEGABYTE)
    first = DownloadProcess(hub, tmp_path, settings=PATIENT)
    wait_for(lambda: partial_size(tmp_path) == 2 * MEGABYTE)
    second = DownloadProcess(hub, tmp_path, settings=PATIENT)
    wait_for(lambda: len(hub.journal.gets("/revision/")) == 2)
    first.kill()
    assert second.result()[0] == "done"
    assert [r.start for r in hub.journal.gets(place="cdn")] == [0, 2 * MEGABYTE]
    assert hub.journal.sent(place="cdn") == SIZE


def test_waiting_for_another_process_ends_with_the_lock_timeout(hub, files, tmp_path):
    hub.fault("stall_body", after=MEGABYTE)
    first = DownloadProcess(hub, tmp_path, settings=PATIENT)
    wait_for(lambda: partial_size(tmp_path) == MEGABYTE)
    try:
        with pytest.raises(StoreBusyError, match="lock_timeout_seconds"):
            fetch_snapshot(hub_model(hub, tmp_path, store_settings={"lock_timeout_seconds": 0.2}))
    finally:
        first.kill()


def test_the_real_client_and_ours_share_the_locks_of_contents(hub, files, tmp_path):
    from huggingface_hub import snapshot_download

    from prefect_huggingface.tasks.storage.hub.cache import RepositoryFolder

    hub.fault("stall_body", after=MEGABYTE)
    ours = DownloadProcess(hub, tmp_path, settings=PATIENT)
    wait_for(lambda: partial_size(tmp_path) == MEGABYTE)
    root = RepositoryFolder.of(hub_model(hub, tmp_path)).root
    other = threading.Thread(
        target=snapshot_download, args=("org/model",), kwargs={"cache_dir": root, "endpoint": hub.endpoint}
    )
    other.start()
    wait_for(lambda: len([r for r in hub.journal.requests if r.method == "HEAD" and WEIGHTS in r.path]) == 2)
    other.join(0.5)
    assert len(hub.journal.gets(place="cdn")) == 1
    for fault in hub.journal.faults:
        fault.is_over = True
    assert ours.result()[0] == "done"
    other.join(30)
    assert hub.journal.sent(place="cdn") == SIZE
