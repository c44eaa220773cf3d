"""A store stays within its budget: the least recently used goes first, and nothing that is in use."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.tasks.errors import PlanError
from prefect_huggingface.tasks.exports import list_stored, prune_stored
from prefect_huggingface.tasks.storage.eviction import evict, list_models
from prefect_huggingface.tasks.storage.exports.store import (
    MANIFEST,
    Manifest,
    describe_files,
    get_export,
    write_manifest,
)
from prefect_huggingface.tasks.storage.locks import LEASE, hold_export

SIZE = 1_000_000


def make_export(store: Path, name: str, last_used: float, **changes: Any) -> Path:
    """Write a folder that the store takes for an export of one megabyte."""
    folder = store / "exports" / name
    folder.mkdir(parents=True)
    (folder / "openvino_model.bin").write_bytes(b"x" * SIZE)
    manifest = Manifest(
        key=name.rjust(64, "0"), source=f"org/{name}", commit="0" * 40, recipe={"weight_format": "int8"}, versions={},
        files=describe_files(folder), created="2026-01-01T00:00:00+00:00", **changes,
    )  # fmt: skip
    write_manifest(folder, manifest)
    (folder / LEASE).touch()
    os.utime(folder / LEASE, (last_used, last_used))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for age, name in enumerate(["newest", "middle", "oldest"]):
        make_export(tmp_path, name, 1_000_000 - 1000 * age)
    return tmp_path


def names(store: Path) -> list[str]:
    return [entry.name for entry in list_models(ModelStore(path=store))]


def test_the_list_says_what_there_is(store: Path) -> None:
    entries = list_stored(ModelStore(path=store))
    assert [entry.name for entry in entries] == ["oldest", "middle", "newest"]
    assert entries[0].source == "org/oldest"
    assert entries[0].recipe == {"weight_format": "int8"}
    assert entries[0].last_used == 998_000
    assert entries[0].size_bytes >= SIZE
    assert not entries[0].in_use


def test_the_least_recently_used_goes_first(store: Path) -> None:
    report = evict(ModelStore(path=store), limit_bytes=2 * SIZE + 100_000)
    assert [entry.name for entry in report.removed] == ["oldest"]
    assert names(store) == ["middle", "newest"]
    assert report.freed_bytes >= SIZE
    assert not list((store / "exports" / ".staging").iterdir())


def test_what_is_used_now_stays(store: Path) -> None:
    with hold_export(store / "exports" / "oldest"):
        os.utime(store / "exports" / "oldest" / LEASE, (0, 0))
        report = evict(ModelStore(path=store), limit_bytes=0)
        assert names(store) == ["oldest"]
        assert [path.name for path in report.in_use] == ["oldest"]
    evict(ModelStore(path=store), limit_bytes=0)
    assert names(store) == []


def test_what_another_process_uses_stays(store: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from prefect_huggingface.tasks.storage.locks import hold_export\n"
        "lease = hold_export(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    folder = store / "exports" / "middle"
    process = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        evict(ModelStore(path=store), limit_bytes=0)
        assert names(store) == ["middle"]
    finally:
        process.kill()
        process.communicate()


def test_a_folder_without_a_manifest_is_listed_and_goes(store: Path) -> None:
    (store / "exports" / "oldest" / MANIFEST).unlink()
    assert next(entry for entry in list_models(ModelStore(path=store)) if entry.name == "oldest").source is None
    evict(ModelStore(path=store), limit_bytes=0)
    assert names(store) == []


def test_pruning_needs_a_size(store: Path) -> None:
    with pytest.raises(PlanError, match="max_size_gb"):
        prune_stored(ModelStore(path=store))
    report = prune_stored(ModelStore(path=store, max_size_gb=0.0011))
    assert len(report.removed) == 2


@pytest.mark.slow
def test_a_new_export_makes_room_for_itself(tiny_llama: Path, store: Path) -> None:
    model = LocalModel(model_id=str(tiny_llama), store=ModelStore(path=store, max_size_gb=0.002))
    export = get_export(model)
    assert export.path.exists()
    assert names(store) == ["newest", export.path.name]


def test_downloads_that_were_given_up_go_with_the_pruning(tmp_path: Path) -> None:
    partials = tmp_path / "hub" / "models--org--name" / "partials"
    partials.mkdir(parents=True)
    for name, age in (("old", 30 * 24 * 3600), ("young", 3600)):
        (partials / name).write_bytes(b"x" * SIZE)
        os.utime(partials / name, (time.time() - age,) * 2)
    kept = make_export(tmp_path, "kept", time.time())

    report = prune_stored(ModelStore(path=tmp_path), max_size_gb=1)

    assert report.abandoned_bytes == SIZE
    assert report.removed == ()
    assert [path.name for path in partials.iterdir()] == ["young"]
    assert kept.exists()
