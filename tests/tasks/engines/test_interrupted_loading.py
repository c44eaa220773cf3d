"""Who is interrupted while a model is loaded ends at once, and the loading goes on for the next one."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.registry import load_engine
from prefect_huggingface.tasks.generation import complete_prompts
from support.interruptions import InterruptibleThread, Interruption
from support.prefect_services import wait_until
from support.tiny_models import copy_with_own_code

SECONDS = 8
# One call of a library, which hears of no exception.
SLOW_CODE = """
import ctypes
with open({log!r}, "a") as log:
    log.write("loading ")
ctypes.CDLL(None).sleep({seconds})
"""


def test_the_caller_ends_and_the_model_is_loaded_once(tiny_llama: Path, tmp_path: Path, caplog) -> None:
    log = tmp_path / "log"
    folder = copy_with_own_code(tiny_llama, tmp_path / "slow", SLOW_CODE.format(log=str(log), seconds=SECONDS))
    model = LocalModel(model_id=str(folder), backend="torch", device="cpu", trust_remote_code=True)
    thread = InterruptibleThread(partial(load_engine, model))
    wait_until(log.exists, 60, "the loading")
    assert thread.interrupt() < SECONDS / 2
    assert isinstance(thread.error, Interruption)

    with caplog.at_level(logging.INFO):
        [completion] = complete_prompts(model, ["Hello"], GenerationOptions(max_new_tokens=4))
    assert completion.error is None
    assert any(message.startswith("Waiting until another run of this process") for message in caplog.messages)
    assert log.read_text() == "loading "
