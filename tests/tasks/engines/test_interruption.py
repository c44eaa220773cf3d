"""Generation ends with the flow or the process that asked for it, and the engine stays usable."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect import flow

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.registry import list_engines, load_engine
from prefect_huggingface.tasks.generation import complete_prompts, generate_text
from prefect_huggingface.tasks.records import Request
from support.prefect_services import wait_until
from support.tiny_models import make_tiny_llama

ENDLESS = GenerationOptions(max_new_tokens=5000, ignore_eos=True)
SHORT = GenerationOptions(max_new_tokens=4)
# A second or two on an idle machine; all of the work would take minutes.
LIMIT = 10
PROMPTS = [f"{number} and" for number in range(64)]
PROGRAM = """
import sys
from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.registry import load_engine
from prefect_huggingface.tasks.generation import complete_prompts, stream_completion

model = LocalModel(model_id=sys.argv[1], backend=sys.argv[2], chat_template="never")
endless = GenerationOptions(max_new_tokens=5000, ignore_eos=True)
load_engine(model)
print("ready", flush=True)
if sys.argv[3] == "generate":
    complete_prompts(model, [f"{number} and" for number in range(64)], endless)
else:
    list(stream_completion(model, "Hello", endless))
"""


@pytest.fixture(scope="module", params=["openvino", "torch"])
def model(request, tiny_openvino: Path, tmp_path_factory) -> LocalModel:
    """A model with room for a text that takes long."""
    folder = tmp_path_factory.mktemp("long") / "model"
    if request.param == "torch":
        make_tiny_llama(folder, context_length=8192)
    else:
        shutil.copytree(tiny_openvino, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    return LocalModel(model_id=str(folder), backend=request.param, chat_template="never")


def assert_free(model: LocalModel) -> None:
    """The engine does nothing for anybody, and answers."""
    wait_until(lambda: all(state.requests == 0 for state in list_engines()), LIMIT, "the end of the generation")
    [completion] = complete_prompts(model, ["Hello"], SHORT)
    assert completion.error is None


WAYS = [("openvino", "generate"), *(pytest.param(*way, marks=pytest.mark.slow) for way in (
    ("openvino", "stream"), ("torch", "generate"), ("torch", "stream"),
))]  # fmt: skip


@pytest.mark.parametrize(("model", "way"), WAYS, indirect=["model"])
def test_ctrl_c_ends_a_process_that_generates(model: LocalModel, way: str) -> None:
    command = [sys.executable, "-c", PROGRAM, model.model_id, model.backend, way]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.5)
            assert process.poll() is None, "the work was done before it could be interrupted"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
    assert b"KeyboardInterrupt" in errors
    assert process.returncode != 0


@pytest.mark.usefixtures("prefect_server")
def test_the_timeout_of_a_flow_ends_generation_and_takes_nobody_with_it(model: LocalModel) -> None:
    @flow(timeout_seconds=1.5)
    def endless() -> int:
        return len(generate_text(model, PROMPTS, ENDLESS))

    other = load_engine(model).submit(Request("Hello", options=GenerationOptions(max_new_tokens=300, ignore_eos=True)))
    began = time.monotonic()
    state = endless(return_state=True)
    assert time.monotonic() - began < 1.5 + LIMIT
    assert state.name == "TimedOut"
    assert other.result(60).generated_tokens == 300
    assert_free(model)
