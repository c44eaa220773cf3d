"""What is in a store, and how a snapshot is removed from it."""

from __future__ import annotations

import os
import shutil
import threading
import time

import pytest
from huggingface_hub import scan_cache_dir

from prefect_huggingface.blocks import ModelStore
from prefect_huggingface.tasks.hub_errors import StoreBusyError
from prefect_huggingface.tasks.storage.hub.cache import (
    RepositoryFolder,
    list_snapshots,
    remove_partials,
    remove_snapshot,
)
from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot
from prefect_huggingface.tasks.storage.locks import hold_export
from support.hub_models import MEGABYTE, check_snapshot, hub_model, model_files
from support.hub_workers import wait_for


@pytest.fixture
def two_commits(hub, tmp_path):
    """Two snapshots of one repository that share their weights."""
    files = model_files(MEGABYTE)
    repository = hub.create("org/model", files)
    first = fetch_snapshot(hub_model(hub, tmp_path))
    repository.commit({**files, "config.json": b"{}"})
    second = fetch_snapshot(hub_model(hub, tmp_path))
    return first, second


def test_snapshots_are_listed_with_size_and_last_use(hub, tmp_path, two_commits):
    first, second = two_commits
    time.sleep(0.02)
    fetch_snapshot(hub_model(hub, tmp_path, revision=first.commit))
    listed = list_snapshots(ModelStore(path=tmp_path))
    assert [s.commit for s in listed] == [second.commit, first.commit]
    assert listed[0].size_bytes == sum(f.size for f in second.files)
    assert listed[0].freed_bytes == len(b"{}")
    assert all(s.complete and s.repo_id == "org/model" for s in listed)
    assert listed[0].last_used < listed[1].last_used <= time.time()


def test_a_removed_snapshot_frees_what_no_other_one_shares(hub, tmp_path, two_commits):
    first, second = two_commits
    old = next(s for s in list_snapshots(ModelStore(path=tmp_path)) if s.commit == first.commit)
    freed = remove_snapshot(old)
    assert freed == old.freed_bytes < MEGABYTE
    assert not first.path.exists()
    check_snapshot(second.path, {**model_files(MEGABYTE), "config.json": b"{}"})
    assert scan_cache_dir(RepositoryFolder.of(hub_model(hub, tmp_path)).root).warnings == []
    assert remove_snapshot(list_snapshots(ModelStore(path=tmp_path))[0]) > MEGABYTE
    assert list_snapshots(ModelStore(path=tmp_path)) == []
    assert not [p for p in tmp_path.rglob("blobs/*")]


def test_a_removed_snapshot_can_be_fetched_again(hub, tmp_path, two_commits):
    first, second = two_commits
    for snapshot in list_snapshots(ModelStore(path=tmp_path)):
        remove_snapshot(snapshot)
    assert fetch_snapshot(hub_model(hub, tmp_path)) == second
    check_snapshot(second.path, {**model_files(MEGABYTE), "config.json": b"{}"})


def test_a_snapshot_in_use_is_not_removed(hub, tmp_path, two_commits):
    first, _ = two_commits
    old = next(s for s in list_snapshots(ModelStore(path=tmp_path)) if s.commit == first.commit)
    with hold_export(first.path):
        with pytest.raises(StoreBusyError, match="in use"):
            remove_snapshot(old)
        check_snapshot(first.path, model_files(MEGABYTE))
    assert remove_snapshot(old) > 0


def test_nothing_is_removed_while_the_repository_is_being_downloaded(hub, tmp_path, two_commits):
    first, _ = two_commits
    hub.repositories["org/model"].commit(model_files(3 * MEGABYTE, seed=5))
    fault = hub.fault("stall_body", after=MEGABYTE)
    thread = threading.Thread(target=fetch_snapshot, args=(hub_model(hub, tmp_path, settings={"timeout_seconds": 60}),))
    thread.start()
    wait_for(lambda: [p for p in tmp_path.rglob("partials/*") if p.stat().st_size == MEGABYTE])
    with pytest.raises(StoreBusyError):
        remove_snapshot(next(s for s in list_snapshots(ModelStore(path=tmp_path)) if s.commit == first.commit))
    fault.is_over = True
    thread.join(30)
    assert len(list_snapshots(ModelStore(path=tmp_path))) == 3


def test_contents_that_were_never_completed_are_removed_after_a_while(hub, tmp_path):
    hub.create("org/model", model_files(3 * MEGABYTE))
    hub.fault("cut", after=MEGABYTE)
    hub.fault("status", status=404, times=None)
    with pytest.raises(Exception, match="404"):
        fetch_snapshot(hub_model(hub, tmp_path))
    assert remove_partials(ModelStore(path=tmp_path)) == 0
    for partial in tmp_path.rglob("partials/*"):
        os.utime(partial, (0, 0))
    assert remove_partials(ModelStore(path=tmp_path)) == MEGABYTE
    assert not list(tmp_path.rglob("partials/*"))


def test_what_a_download_that_goes_on_has_got_before_stays(hub, tmp_path):
    hub.create("org/model", model_files(3 * MEGABYTE))
    snapshot = fetch_snapshot(hub_model(hub, tmp_path))
    repository = RepositoryFolder.of(hub_model(hub, tmp_path)).path
    # As after a download that was cut long ago, with its contents whole and no snapshot of them.
    shutil.rmtree(snapshot.path)
    shutil.rmtree(repository / "manifests")
    marks = list(repository.glob("downloaded/*/*"))
    weights = max((mark for mark in marks), key=lambda mark: (repository / "blobs" / mark.name).stat().st_size)
    for mark in marks:
        os.utime(mark, (0, 0))
    small = [mark for mark in marks if mark != weights]
    (repository / "blobs" / small[0].name).unlink()
    fault = hub.fault("stall_body", after=1)
    thread = threading.Thread(target=fetch_snapshot, args=(hub_model(hub, tmp_path, settings={"timeout_seconds": 60}),))
    thread.start()
    wait_for(lambda: weights.stat().st_mtime > 0)
    assert remove_partials(ModelStore(path=tmp_path)) == 0
    fault.is_over = True
    thread.join(30)
    check_snapshot(snapshot.path, model_files(3 * MEGABYTE))


def test_an_empty_store_lists_nothing(tmp_path):
    assert list_snapshots(ModelStore(path=tmp_path / "none")) == []
