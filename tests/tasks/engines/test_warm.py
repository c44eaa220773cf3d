"""A warm model: another process answers, with the same completions, for all callers, and outlives its own end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cloudpickle
import pytest
from prefect.filesystems import RemoteFileSystem
from prefect.results import ResultRecord

from prefect_huggingface.blocks import GenerationOptions, LocalModel, WarmModel
from prefect_huggingface.tasks.engines.warm.leftovers import remove_stored
from prefect_huggingface.tasks.engines.warm.messages import (
    pack_completion,
    pack_request,
    run_name,
    unpack_completion,
    unpack_request,
    worker_name,
    worker_of,
)
from prefect_huggingface.tasks.generation import complete_prompts
from prefect_huggingface.tasks.records import Completion, Request
from support.prefect_services import PrefectServices, prefect_services, stop_process, wait_until
from support.warm_processes import read_calls, start_caller, start_worker

PROMPTS = ["What is the capital of France?", "", "What is the capital of Spain?", "What is the number 42 in French?"]
LONG = {"max_new_tokens": 200, "ignore_eos": True}
# Of a thousand such texts some are done within seconds, and all of them take much longer.
SOME_DONE = {"max_new_tokens": 100, "ignore_eos": True, "do_sample": True}
SAVE = """
from prefect_huggingface.blocks import GenerationOptions, HuggingFaceCredentials, LocalModel
LocalModel(
    model_id={model!r}, backend="torch", dtype="float32", options=GenerationOptions(max_new_tokens=16),
    credentials=HuggingFaceCredentials(token="hf_canary"),
).save("small")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory, bundled_model: Path) -> Iterator[PrefectServices]:
    """A server with a saved model."""
    with prefect_services(tmp_path_factory.mktemp("warm-services")) as running:
        code = SAVE.format(model=str(bundled_model))
        subprocess.run([sys.executable, "-c", code], env=running.environment, check=True, timeout=120)
        yield running


class Workers:
    """The warm worker of the tests, which they may kill and start."""

    def __init__(self, server: PrefectServices) -> None:
        self.server = server
        self.log = server.home / "warm-worker.log"
        self.process = start_worker(server, self.log)
        self._lost = 0

    def start(self) -> None:
        self.process = start_worker(self.server, self.log)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.killpg(self.process.pid, number)
        self.process.wait(30)
        self._lost = self.begun() - self.ended()

    def begun(self) -> int:
        """How many background tasks workers have begun."""
        return self.log.read_text().count("Submitting task run")

    def ended(self) -> int:
        """How many of them they have ended, or refused because nobody waits any more."""
        log = self.log.read_text()
        return log.count("Finished in state") + log.count("Failed to read parameters")

    def wait_for_work(self) -> None:
        """Return when a worker begins with a further background task."""
        before = self.begun()
        wait_until(lambda: self.begun() > before, 120, "the start of an answer", every=0.01)

    def wait_for_rest(self) -> None:
        """Return when no background task runs, neither for Prefect nor in the worker."""
        running = {"state": {"type": {"any_": ["RUNNING"]}}}
        wait_until(lambda: not self.server.post("task_runs/filter", task_runs=running), 30, "the end of the runs")
        wait_until(lambda: self.begun() == self.ended() + self._lost, 30, "the end of the work")


@pytest.fixture(scope="module")
def workers(server: PrefectServices) -> Iterator[Workers]:
    running = Workers(server)
    yield running
    stop_process(running.process)


@contextmanager
def caller(workers: Workers, folder: Path, name: str = "caller", **settings) -> Iterator[subprocess.Popen[bytes]]:
    """A process that asks the warm model; it is gone at the end."""
    settings = {"prompts": PROMPTS, "warm": {"model": "small", "worker_timeout_seconds": 120}, **settings}
    process = start_caller(workers.server, folder, name, **settings)
    try:
        yield process
    finally:
        stop_process(process)


def ask(workers: Workers, folder: Path, **settings) -> list[dict]:
    """Ask the warm model and return what the calls came to."""
    with caller(workers, folder, **settings) as process:
        process.wait(240)
    return read_calls(folder, "caller")


@pytest.fixture(scope="module")
def local_answers(bundled_model: Path) -> list[Completion]:
    # Without an export, which would take longer than all the rest.
    model = LocalModel(model_id=str(bundled_model), backend="torch", dtype="float32")
    return complete_prompts(model, PROMPTS, GenerationOptions(max_new_tokens=16))


def without_times(completions: list[dict]) -> list[dict]:
    return [{name: value for name, value in each.items() if name != "seconds"} for each in completions]


def test_answers_are_those_of_the_model_here_and_come_quickly(workers, tmp_path, local_answers):
    wanted = without_times(json.loads(json.dumps([each.as_dict() for each in local_answers])))
    calls = ask(workers, tmp_path, calls=6)
    for each in calls:
        assert without_times(each["completions"]) == wanted
        assert each["loaded"] == []
    assert [each["text"] for each in calls[0]["completions"]] == ["Paris", "", "Madrid", "quarante-deux"]
    assert calls[0]["completions"][1]["error_code"] == "empty_prompt"
    # The first call waits for the worker and for loading, the others for nothing. Idle machines take 0.2 s.
    assert workers.log.read_text().count("Loaded ") == 1
    print(f"round trips: {[round(each['seconds'], 2) for each in calls]}")
    assert min(each["seconds"] for each in calls[1:]) < max(1.0, calls[0]["seconds"] / 4)


def test_two_callers_share_the_engine_at_the_same_time(workers, tmp_path):
    settings = {"prompts": PROMPTS[:1], "options": LONG}
    with caller(workers, tmp_path, "one", **settings) as one, caller(workers, tmp_path, "two", **settings) as two:
        assert one.wait(240) == two.wait(240) == 0
    found = [read_calls(tmp_path, name)[0]["completions"][0] for name in ("one", "two")]
    assert [each["generated_tokens"] for each in found] == [200, 200]
    assert found[0]["text"] == found[1]["text"]
    assert workers.log.read_text().count("Loaded ") == 1


def read_storage(workers: Workers) -> list[bytes]:
    """What Prefect stores of calls now, as bytes in which texts can be found."""
    found = []
    for path in (workers.server.home / "storage").rglob("*"):
        # A file may be written or removed just now.
        with suppress(OSError, ValueError):
            found.append(cloudpickle.dumps(ResultRecord.deserialize(path.read_bytes()).result))
    return found


def test_prompts_travel_without_blocks_and_tokens_and_nothing_stays(workers, tmp_path):
    before = read_storage(workers)
    prompt = "What is the capital of Italy?"
    stored: list[bytes] = []
    with caller(workers, tmp_path, prompts=[prompt], options=LONG, calls=3) as process:
        while process.poll() is None:
            stored += read_storage(workers)
    assert read_calls(tmp_path, "caller")[0]["completions"][0]["text"].startswith("Rome")
    assert any(prompt.encode() in content for content in stored)
    assert any(b"Rome" in content for content in stored)
    assert not any(b"hf_canary" in content for content in stored)
    assert "hf_canary" not in workers.log.read_text()
    assert read_storage(workers) == before


def assert_nothing_stays(workers, *words):
    """No stored file has one of these words, after everything has ended."""
    workers.wait_for_rest()
    stored = read_storage(workers)
    assert not [word for word in words if any(word.encode() in content for content in stored)]


def test_what_cannot_be_removed_is_emptied(tmp_path):
    storage = RemoteFileSystem(basepath=f"memory://{tmp_path.name}")
    storage.write_path("parameters/1", b"a prompt")
    remove_stored(storage, "parameters/1")
    assert storage.read_path("parameters/1") == b""


def test_a_missing_block_is_an_error_of_every_row(workers, tmp_path):
    [call] = ask(workers, tmp_path, warm={"model": "no-such-block", "worker_timeout_seconds": 60})
    for completion in call["completions"]:
        assert completion["error_code"] == "engine_error"
        assert "no-such-block" in completion["error"]


def test_the_timeout_of_the_caller_ends_generation_in_the_worker(workers, tmp_path):
    warm = {"model": "small", "timeout_seconds": 4, "max_requests": 1000}
    prompts = ["What is the capital of Peru?"] * 1000
    [call] = ask(workers, tmp_path, prompts=prompts, options=SOME_DONE, warm=warm)
    assert call["seconds"] < 30
    assert "deadline" in {each["error_code"] for each in call["completions"]}
    assert_nothing_stays(workers, "Peru", "Lima")


def test_a_caller_that_is_interrupted_ends_generation_in_the_worker(workers, tmp_path):
    settings = {
        "prompts": ["What is the capital of Chile?"] * 1000, "options": SOME_DONE,
        "warm": {"model": "small", "max_requests": 1000},
    }  # fmt: skip
    with caller(workers, tmp_path, **settings) as process:
        workers.wait_for_work()
        time.sleep(4)
        process.send_signal(signal.SIGINT)
        process.wait(30)
    assert_nothing_stays(workers, "Chile", "Santiago")


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_a_request_outlives_the_worker_that_answers_it(workers, tmp_path, kills):
    prompts, dice = PROMPTS[:1] * 4, random.Random(kills)
    # Enough for all lives: loading takes some seconds, and a call then half a second.
    with caller(workers, tmp_path, prompts=prompts, options=LONG, calls=6 * kills) as process:
        for _ in range(kills):
            workers.wait_for_work()
            time.sleep(0.1 if kills == 1 else dice.uniform(0, 6))  # a single one has to meet a call
            workers.kill()
            workers.start()
        process.wait(280 * kills)
    calls = read_calls(tmp_path, "caller")
    assert len(calls) == 6 * kills
    for each in calls:
        assert {completion["error"] for completion in each["completions"]} == {None}
        assert [completion["generated_tokens"] for completion in each["completions"]] == [200] * 4
    assert "handed over again" in (tmp_path / "caller.log").read_text()
    assert_nothing_stays(workers, PROMPTS[0], "Paris")


def test_without_a_worker_the_error_says_what_to_start(workers, tmp_path):
    workers.kill(signal.SIGTERM)
    try:
        [call] = ask(workers, tmp_path, warm={"model": "small", "worker_timeout_seconds": 2})
    finally:
        workers.start()
    assert call["seconds"] < 15
    # The server may take the worker for connected when the engine is made; then the request has the error.
    assert "deployments.warm_worker" in (call.get("error") or call["completions"][0]["error"])
    assert call.get("error", "EngineError").startswith("EngineError")


def test_requests_and_completions_travel_whole():
    request = Request(
        messages=[{"role": "user", "content": "hi"}], options=GenerationOptions(max_new_tokens=3, stop=["."]),
        id="row", images=["a.png"], tools=[{"type": "function"}], chat_template="always",
    )  # fmt: skip
    packed = json.loads(json.dumps(pack_request(request)))
    assert packed["options"] == {"max_new_tokens": 3, "stop": ["."]}
    unpacked = unpack_request(packed, 7)
    assert unpacked.id == 7
    assert (unpacked.options, unpacked.chat_template, list(unpacked.images)) == (request.options, "always", ["a.png"])
    completion = Completion(
        "a", "stop", 1, 2, 3.0, alternatives=("b",), logprobs=(-0.5,), parsed={"x": 1}, request_id=7
    )
    back = unpack_completion(json.loads(json.dumps(pack_completion(completion))), request, 4.0)
    assert back.request_id == "row"
    assert (back.text, back.alternatives, back.logprobs, back.parsed, back.seconds) == (
        "a",
        ("b",),
        (-0.5,),
        {"x": 1},
        4,
    )


def test_the_name_of_a_run_tells_its_worker():
    assert worker_of(run_name(3)) == worker_name()
    assert worker_of("answer-requests-a1b") is None


def test_a_block_has_a_name_and_defaults():
    assert WarmModel().model == "default"
    with pytest.raises(ValueError, match="timeout_seconds"):
        WarmModel(timeout_seconds=0)
