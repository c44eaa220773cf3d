"""A disk that is too small or becomes full."""

from __future__ import annotations

import os
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from prefect_huggingface.blocks import ModelStore
from prefect_huggingface.tasks.hub_errors import DiskFullError, StoreLimitError
from prefect_huggingface.tasks.storage.hub.cache import list_snapshots
from prefect_huggingface.tasks.storage.hub.download import fetch_snapshot, plan_snapshot
from prefect_huggingface.tasks.storage.locks import hold_export
from support.hub_models import MEGABYTE, check_snapshot, hub_model, model_files
from support.hub_workers import wait_for


@pytest.fixture
def small_disk(tmp_path):
    """Folder on a real file system of 12 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", place], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_what_cannot_fit_fails_before_its_first_byte(hub, small_disk):
    hub.create("org/model", model_files(16 * MEGABYTE))
    with pytest.raises(DiskFullError) as caught:
        fetch_snapshot(hub_model(hub, small_disk))
    assert caught.value.fields["needed_bytes"] > 16 * MEGABYTE > caught.value.fields["free_bytes"]
    assert {r.place for r in hub.journal.requests} == {"api"}
    plan = plan_snapshot(hub_model(hub, small_disk))
    assert not plan.fits
    assert "free" in plan.problem


def test_a_disk_that_becomes_full_is_an_error_and_the_download_goes_on_later(hub, small_disk):
    hub.create("org/model", files := model_files(8 * MEGABYTE))
    fault = hub.fault("stall_body", after=2 * MEGABYTE)
    errors: list[Exception] = []
    thread = threading.Thread(target=_fetch, args=(hub, small_disk, errors))
    thread.start()
    wait_for(lambda: [p for p in small_disk.rglob("partials/*") if p.stat().st_size == 2 * MEGABYTE])
    filler = _fill(small_disk)
    fault.is_over = True
    thread.join(20)
    assert [type(error) for error in errors] == [DiskFullError]
    assert not errors[0].transient
    filler.unlink()
    kept = max(p.stat().st_size for p in small_disk.rglob("partials/*"))
    assert kept >= 2 * MEGABYTE
    hub.journal.clear()
    check_snapshot(fetch_snapshot(hub_model(hub, small_disk)).path, files)
    assert hub.journal.sent(place="cdn") == 8 * MEGABYTE - kept


def test_a_snapshot_larger_than_the_store_may_become_is_refused_early(hub, tmp_path):
    hub.create("org/model", model_files(4 * MEGABYTE))
    model = hub_model(hub, tmp_path, store_settings={"max_size_gb": 0.003})
    with pytest.raises(StoreLimitError, match="max_size_gb"):
        fetch_snapshot(model)
    assert "max_size_gb" in plan_snapshot(model).problem
    assert {r.place for r in hub.journal.requests} == {"api"}


def test_the_store_keeps_to_its_limit_and_the_least_recently_used_goes_first(hub, tmp_path):
    for number in range(4):
        hub.create(f"org/model{number}", model_files(2 * MEGABYTE, seed=number))
    limit = {"store_settings": {"max_size_gb": 0.0065}}
    models = [hub_model(hub, tmp_path, f"org/model{number}", **limit) for number in range(4)]
    held = hold_export(fetch_snapshot(models[0]).path)
    for model in models[1:3]:
        fetch_snapshot(model)
    fetch_snapshot(models[3])
    # The first is the oldest, but in use.
    assert {s.repo_id for s in list_snapshots(ModelStore(path=tmp_path))} == {"org/model0", "org/model2", "org/model3"}
    assert sum(p.stat().st_size for p in tmp_path.rglob("blobs/*")) <= 6_500_000
    held.close()


def test_what_was_used_least_recently_goes_where_the_disk_is_smaller_than_the_store_may_become(hub, small_disk):
    limit = {"store_settings": {"max_size_gb": 0.011}}
    for number in range(2):
        hub.create(f"org/model{number}", model_files(7 * MEGABYTE, seed=number))
        check_snapshot(
            fetch_snapshot(hub_model(hub, small_disk, f"org/model{number}", **limit)).path,
            model_files(7 * MEGABYTE, seed=number),
        )
    assert [s.repo_id for s in list_snapshots(ModelStore(path=small_disk))] == ["org/model1"]


def _fetch(hub, store, errors):
    try:
        fetch_snapshot(hub_model(hub, store, settings={"timeout_seconds": 30}))
    except Exception as exc:
        errors.append(exc)


def _fill(folder: Path) -> Path:
    filler = folder / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            os.fsync(file.fileno())
    return filler
