"""An export that is interrupted leaves nothing behind, and one that is waited for is named in the log."""

from __future__ import annotations

import logging
import signal
import threading
import time
from pathlib import Path

import pytest

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.tasks.records import Export
from prefect_huggingface.tasks.storage.exports.store import get_export
from support.export_requests import finish_request, published, staged, start_request, wait_for_child, wait_until_gone
from support.prefect_services import wait_until


def test_ctrl_c_leaves_no_process_and_no_folder(tiny_llama: Path, tmp_path: Path) -> None:
    process = start_request(tmp_path, tiny_llama)
    wait_for_child(tmp_path)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)  # a second on an idle machine
    assert b"KeyboardInterrupt" in errors
    wait_until_gone(tmp_path)
    assert staged(tmp_path) == published(tmp_path) == []


def test_a_wait_for_an_export_names_its_process(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = LocalModel(model_id=str(tiny_llama), store=ModelStore(path=tmp_path))
    found: list[Export] = []
    process = start_request(tmp_path, tiny_llama)
    wait_for_child(tmp_path)
    waiting = threading.Thread(target=lambda: found.append(get_export(model)))
    with caplog.at_level(logging.INFO):
        waiting.start()
        wait_until(lambda: "Waiting for" in caplog.text, 20, "the notice")
    answer = finish_request(process)
    waiting.join()
    assert f"process {process.pid}" in next(text for text in caplog.messages if text.startswith("Waiting for"))
    assert (str(found[0].path), found[0].reused) == (answer["path"], True)
