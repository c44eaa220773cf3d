"""The model server under load: one batch for all, one load for all, memory, drains and kills."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from prefect_huggingface.blocks import GenerationOptions, InferenceEndpoint
from prefect_huggingface.tasks.engines.registry import load_engine
from prefect_huggingface.tasks.records import Request
from support.model_servers import USER, ModelServerProcess, RawClient, model_server
from support.prefect_services import wait_until

ENDLESS = {"max_tokens": 8000, "ignore_eos": True, "stream": True}
READY = "is ready after"


@pytest.fixture(scope="module")
def crowd(long_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServerProcess]:
    """A server that a hundred clients asked at once for its model before it was loaded."""
    with model_server(tmp_path_factory.mktemp("crowd"), "--model", str(long_model)) as server:
        with ThreadPoolExecutor(100) as pool:
            answers = list(pool.map(lambda number: server.chat(max_tokens=3, seed=number), range(100)))
        assert {answer.status_code for answer in answers} == {200}
        yield server


def test_a_hundred_first_requests_load_the_model_once(crowd: ModelServerProcess) -> None:
    assert crowd.log.read_text().count(READY) == 1


def test_64_streams_share_one_batch(crowd: ModelServerProcess) -> None:
    client = openai.OpenAI(base_url=crowd.url, api_key="none", max_retries=0, timeout=120)
    begins, ends = [], []

    def stream(number: int) -> None:
        chunks = client.chat.completions.create(
            model="long-model", messages=USER, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        texts = [time.monotonic() for chunk in chunks if chunk.choices[0].delta.content]
        begins.append(texts[0])
        ends.append(texts[-1])

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(stream, range(64)))
    # The last one began before the first one was done.
    assert len(begins) == 64
    assert max(begins) < min(ends)


def test_clients_that_go_away_free_their_requests(crowd: ModelServerProcess) -> None:
    clients = [RawClient(crowd) for _ in range(32)]
    for client in clients:
        client.send_chat({}, **ENDLESS)
    for client in clients:
        client.read_until(b'"content":')
    silent = RawClient(crowd)
    silent.send_chat({}, **{**ENDLESS, "stream": False})
    wait_until(lambda: crowd.read_metric("vllm:num_requests_running") == 33, 30, "the last request")
    for client in (*clients, silent):
        client.close()
    wait_until(lambda: crowd.read_metric("vllm:num_requests_running") == 0, 10, "the end of the requests", every=0.05)
    began = time.monotonic()
    assert crowd.chat(max_tokens=2).status_code == 200
    assert time.monotonic() - began < 10  # the 33 texts would take minutes
    ends = httpx.get(f"{crowd.origin}/metrics").text
    assert 'vllm:request_success_total{finished_reason="abort",model_name="long-model"} 33.0' in ends


def test_two_models_stay_within_the_memory(long_model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(long_model, tmp_path / "other-model")
    models = ("--model", str(long_model), "--model", str(other))
    # Less than an empty process takes, so that there is room for one model at a time.
    with model_server(tmp_path, *models, "--memory-gb", "0.05") as server:
        for name in ("long-model", "other-model", "long-model"):
            assert server.chat(model=name, max_tokens=2).status_code == 200
        log = server.log.read_text()
        assert log.count(READY) == 3
        assert log.count("to keep within the memory budget") == 2
        # One that is in use is not closed for another one.
        client = RawClient(server)
        client.send_chat({}, model="long-model", **ENDLESS)
        client.read_until(b'"content":')
        refused = server.chat(model="other-model", max_tokens=2)
        assert refused.status_code == 503
        assert "memory" in refused.json()["error"]["message"].lower()
        assert int(refused.headers["retry-after"]) > 0
        client.close()


def test_an_idle_model_is_closed_and_loaded_again(long_model: Path, tmp_path: Path) -> None:
    with model_server(tmp_path, "--model", str(long_model), "--idle-minutes", "0.02") as server:
        server.chat(max_tokens=2)
        wait_until(lambda: "Closed 1 idle model" in server.log.read_text(), 30, "the end of the model")
        assert server.chat(max_tokens=2).status_code == 200


def test_sigterm_ends_what_runs_and_takes_nothing_new(long_model: Path, tmp_path: Path) -> None:
    with model_server(tmp_path, "--model", str(long_model)) as server:
        server.chat(max_tokens=2)
        running = RawClient(server)
        running.send_chat({}, **{**ENDLESS, "max_tokens": 400})
        running.read_until(b'"content":')
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: _is_refused(server), 10, "the refusal", every=0.05)
        assert b'"finish_reason":"length"' in running.read_until(b"[DONE]")
        assert server.process.wait(30) == 0


def test_sigterm_does_not_wait_for_ever(long_model: Path, tmp_path: Path) -> None:
    with model_server(tmp_path, "--model", str(long_model), "--drain-seconds", "1") as server:
        running = RawClient(server)
        running.send_chat({}, **ENDLESS)
        running.read_until(b'"content":')
        began = time.monotonic()
        assert server.kill(signal.SIGTERM) == 0
        assert time.monotonic() - began < 20


def test_a_kill_loses_only_what_runs_and_the_endpoint_sends_it_again(long_model: Path, tmp_path: Path) -> None:
    with model_server(tmp_path, "--model", str(long_model)) as server:
        options = GenerationOptions(max_new_tokens=200, ignore_eos=True)
        endpoint = InferenceEndpoint(
            url=server.url, model_id="long-model", options=options, extra_options=["ignore_eos"]
        )
        engine = load_engine(endpoint)
        futures = [engine.submit(Request(f"{number} and")) for number in range(16)]
        wait_until(lambda: server.read_metric("vllm:num_requests_running") > 4, 60, "the requests", every=0.02)
        server.kill()
        assert not all(future.done() for future in futures)
        server.start()
        completions = [future.result(120) for future in futures]
        assert [(each.error, each.generated_tokens) for each in completions] == [(None, 200)] * 16


def _is_refused(server: ModelServerProcess) -> bool:
    try:
        RawClient(server).close()
    except OSError:
        return True
    return False
