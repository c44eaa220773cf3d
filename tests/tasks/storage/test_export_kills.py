"""An export that is killed at any moment leaves nothing that could be taken for whole, and nothing for long."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from prefect_huggingface.tasks.storage.exports.store import find_damage, read_manifest
from support.export_requests import (
    finish_request,
    published,
    staged,
    start_request,
    wait_for_child,
    wait_until_gone,
)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, and not its children, as the system does when memory runs out."""
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def assert_whole(folder: Path) -> None:
    """Fail unless a folder with the name of an export is one, byte for byte."""
    manifest = read_manifest(folder)
    assert manifest is not None, f"{folder.name} has no manifest"
    assert find_damage(folder, manifest, verify=True) is None


def test_a_killed_export_is_swept_and_made_again(tiny_llama: Path, tmp_path: Path) -> None:
    process = start_request(tmp_path, tiny_llama)
    wait_for_child(tmp_path)
    time.sleep(1.0)
    kill(process)
    wait_until_gone(tmp_path)
    assert published(tmp_path) == []
    assert staged(tmp_path), "the test has killed nothing"
    answer = finish_request(start_request(tmp_path, tiny_llama))
    assert not answer["reused"]
    assert_whole(Path(answer["path"]))
    assert staged(tmp_path) == []


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_random_moments(tiny_llama: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    finish_request(start_request(tmp_path / "whole", tiny_llama))
    whole_seconds = time.monotonic() - started
    store = tmp_path / "store"
    moments = random.Random(7)
    for _ in range(20):
        process = start_request(store, tiny_llama)
        time.sleep(moments.uniform(0.0, whole_seconds))
        kill(process)
        wait_until_gone(store)
        for folder in published(store):
            assert_whole(folder)
        assert len(staged(store)) <= 2, "more than the last folder and its lock are left"
    answer = finish_request(start_request(store, tiny_llama))
    assert_whole(Path(answer["path"]))
    assert len(published(store)) == 1
    finish_request(start_request(store, tiny_llama, weight_format="int4"))
    assert staged(store) == []
    assert len(published(store)) == 2
