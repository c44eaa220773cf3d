"""Generation ends with the thread or the flow that asked for it, and the engine stays usable."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from prefect import flow

from prefect_huggingface.blocks import GenerationOptions, LocalModel
from prefect_huggingface.tasks.engines.registry import load_engine
from prefect_huggingface.tasks.generation import complete_prompts, generate_text, stream_completion
from prefect_huggingface.tasks.records import Request
from support.interruptions import InterruptibleThread, Interruption
from support.tiny_models import make_tiny_llama

ENDLESS = GenerationOptions(max_new_tokens=5000, ignore_eos=True)
SHORT = GenerationOptions(max_new_tokens=4)
# A second or two on an idle machine; all of the work would take minutes.
LIMIT = 10
PROMPTS = [f"{number} and" for number in range(64)]


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
    engine = load_engine(model)
    began = time.monotonic()
    while engine.unshared._under_way():
        assert time.monotonic() - began < LIMIT, "the generation goes on"
        time.sleep(0.05)
    [completion] = complete_prompts(model, ["Hello"], SHORT)
    assert completion.error is None


def assert_busy(model: LocalModel, requests: int = 1) -> None:
    began = time.monotonic()
    engine = load_engine(model)
    while len(engine.unshared._under_way()) < requests:
        assert time.monotonic() - began < 60, "the generation does not begin"
        time.sleep(0.05)


def stream_all(model: LocalModel) -> None:
    for _ in stream_completion(model, "Hello", ENDLESS):
        pass


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_an_exception_in_the_thread_of_the_caller_ends_generation(model, way):
    load_engine(model)
    call = partial(complete_prompts, model, PROMPTS, ENDLESS) if way == "generate" else partial(stream_all, model)
    thread = InterruptibleThread(call)
    assert_busy(model)
    assert thread.interrupt() < LIMIT
    assert isinstance(thread.error, Interruption)
    assert_free(model)


def test_what_is_interrupted_takes_nobody_with_it(model):
    other = load_engine(model).submit(Request("Hello", options=GenerationOptions(max_new_tokens=300, ignore_eos=True)))
    thread = InterruptibleThread(partial(complete_prompts, model, PROMPTS, ENDLESS))
    assert_busy(model, requests=2)
    thread.interrupt()
    assert other.result(60).generated_tokens == 300
    assert_free(model)


def test_two_that_wait_for_the_same_engine_are_interrupted_together(model):
    # The second one waits for the lock under which the first one loads.
    changed = model.model_copy(update={"ov_config": {"INFERENCE_NUM_THREADS": 1}, "model_kwargs": {}})
    threads = [InterruptibleThread(partial(load_engine, changed)) for _ in range(3)]
    time.sleep(0.1)
    for thread in threads:
        thread.send()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert_free(changed)


def test_a_loaded_engine_is_used_without_an_import(model, monkeypatch):
    """An exception that meets an import can leave the import lock held, and then the whole process stands still."""
    sought = []

    class Recorder:
        def find_spec(self, name, path=None, target=None):
            sought.append(name)

    for _ in range(2):
        complete_prompts(model, ["Hello"], SHORT)
        list(stream_completion(model, "Hello", SHORT))
        monkeypatch.setattr(sys, "meta_path", [Recorder(), *sys.meta_path])
    assert sought == []


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("where", ["main thread", "other thread"])
def test_the_timeout_of_a_flow_ends_generation(model, where):
    @flow(timeout_seconds=1.5)
    def endless() -> int:
        return len(generate_text(model, PROMPTS, ENDLESS))

    load_engine(model)
    states, began = [], time.monotonic()

    def run() -> None:
        states.append(endless(return_state=True))

    if where == "main thread":
        run()
    else:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert time.monotonic() - began < 1.5 + LIMIT
    assert states[0].name == "TimedOut"
    assert_free(model)
