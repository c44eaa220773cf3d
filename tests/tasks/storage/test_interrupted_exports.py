"""An export that is interrupted leaves nothing behind, and one that is waited for is named in the log."""

from __future__ import annotations

import logging
import time
from functools import partial
from pathlib import Path

from prefect_huggingface.blocks import LocalModel, ModelStore
from prefect_huggingface.tasks.storage.exports.publication import get_export
from support.export_requests import finish_request, published, staged, start_request, wait_for_child, wait_until_gone
from support.interruptions import InterruptibleThread, Interruption

# A second on an idle machine.
LIMIT = 10


def test_an_interrupted_export_leaves_no_process_and_no_folder(tiny_llama: Path, tmp_path: Path) -> None:
    model = LocalModel(model_id=str(tiny_llama), store=ModelStore(path=tmp_path / "store"))
    thread = InterruptibleThread(partial(get_export, model))
    wait_for_child(model.store_path)
    time.sleep(0.5)
    assert thread.interrupt() < LIMIT
    assert isinstance(thread.error, Interruption)
    wait_until_gone(model.store_path)
    assert staged(model.store_path) == published(model.store_path) == []


def test_who_waits_for_an_export_says_so_and_can_be_interrupted(tiny_llama: Path, tmp_path: Path, caplog) -> None:
    model = LocalModel(model_id=str(tiny_llama), store=ModelStore(path=tmp_path / "store"))
    process = start_request(model.store_path, tiny_llama)
    try:
        wait_for_child(model.store_path)
        with caplog.at_level(logging.INFO):
            thread = InterruptibleThread(partial(get_export, model))
            time.sleep(3)
        assert thread.is_alive()
        waits = [message for message in caplog.messages if message.startswith("Waiting for")]
        assert waits
        assert f"process {process.pid}" in waits[0]
        assert thread.interrupt() < LIMIT
        assert isinstance(thread.error, Interruption)
    finally:
        answer = finish_request(process)
    assert published(model.store_path) == [Path(answer["path"])]
