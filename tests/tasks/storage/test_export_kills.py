"""An export that is interrupted or killed leaves nothing that could be taken for whole, and nothing for long."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.tasks.records import Export
from prefect_huggingface.tasks.storage.exports.store import find_damage, get_export, read_manifest
from support.export_requests import (
    finish_request,
    flip_byte,
    published,
    staged,
    start_request,
    wait_for_child,
    wait_until_gone,
)
from support.prefect_services import wait_until


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, and not its children, as the system does when memory runs out."""
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def assert_whole(folder: Path) -> None:
    """Fail unless a folder with the name of an export is one, byte for byte."""
    manifest = read_manifest(folder)
    assert manifest is not None, f"{folder.name} has no manifest"
    assert find_damage(folder, manifest, verify=True) is None


def test_ctrl_c_leaves_no_process_and_no_folder(tiny_llama: Path, tmp_path: Path) -> None:
    process = start_request(tmp_path, tiny_llama)
    wait_for_child(tmp_path)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)  # a second on an idle machine
    assert b"KeyboardInterrupt" in errors
    wait_until_gone(tmp_path)
    assert staged(tmp_path) == published(tmp_path) == []


def test_a_killed_export_is_swept_and_one_with_damage_is_made_again(
    tiny_llama: Path, exported: LocalModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Who waits for the one that is made again is told which process makes it."""
    process = start_request(tmp_path, tiny_llama)
    wait_for_child(tmp_path)
    time.sleep(1.0)
    kill(process)
    wait_until_gone(tmp_path)
    assert published(tmp_path) == []
    assert staged(tmp_path), "the test has killed nothing"

    whole = get_export(exported).path
    flip_byte(shutil.copytree(whole, tmp_path / "exports" / whole.name) / "openvino_model.bin")
    process, found = start_request(tmp_path, tiny_llama), list[Export]()
    wait_for_child(tmp_path)
    model = LocalModel(model_id=str(tiny_llama), store=ModelStore(path=tmp_path))
    waiting = threading.Thread(target=lambda: found.append(get_export(model)))
    with caplog.at_level(logging.INFO):
        waiting.start()
        wait_until(lambda: "Waiting for" in caplog.text, 60, "the notice")
    answer = finish_request(process)
    waiting.join()
    assert f"process {process.pid}" in next(text for text in caplog.messages if text.startswith("Waiting for"))
    assert (str(found[0].path), found[0].reused) == (answer["path"], True)
    assert not answer["reused"]
    assert Path(answer["path"]).name == whole.name
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
